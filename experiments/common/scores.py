"""Scores of generated texts against the right ones, in percent."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

References = Sequence[Sequence[str]]


def exact(found: Sequence[str], wanted: References) -> float:
    """The share that is one of its references, white space and case apart."""
    same = [_plain(f) in {_plain(r) for r in refs} for f, refs in zip(found, wanted, strict=True)]
    return 100 * sum(same) / len(same)


def number(found: Sequence[str], wanted: References) -> float:
    """The share whose last number is the reference's (GSM8K's answers end in `#### n`)."""
    same = [
        _last(f) is not None and _last(f) == _last(refs[0])
        for f, refs in zip(found, wanted, strict=True)
    ]
    return 100 * sum(same) / len(same)


def bleu(found: Sequence[str], wanted: References) -> float:
    """Corpus BLEU with up to all references of each text, by sacrebleu (Post 2018).

    **Raises:** `ValueError` where sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as e:
        raise ValueError("BLEU needs sacrebleu: install the extra, jpeft[text]") from e
    most = max(len(refs) for refs in wanted)
    columns: Any = [[refs[i] if i < len(refs) else None for refs in wanted] for i in range(most)]
    # E2E's texts are tokenised, as they are published: sacrebleu warns of that.
    return float(sacrebleu.corpus_bleu(list(found), columns, force=True).score)


SCORES: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact": exact,
    "number": number,
    "bleu": bleu,
}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _last(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
