"""Texts to token ids, by the tokenizer in a model's directory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing

from experiments.common.models import ModelError
from experiments.common.readers import Row


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised example; `segments` is 0 for the first text and 1 for the second."""

    ids: list[int]
    segments: list[int]
    label: float


def load_tokenizer(directory: pathlib.Path) -> Any:
    """The tokenizer: `tokenizer.json`, else BERT's `vocab.txt`, else `vocab.json` and `merges.txt`.

    **Raises:** `ModelError`.
    """
    has = {n for n in ("tokenizer.json", "vocab.txt", "vocab.json") if (directory / n).is_file()}
    try:
        if "tokenizer.json" in has:
            return Tokenizer.from_file(str(directory / "tokenizer.json"))
        if "vocab.txt" in has:
            return BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=True)
        if "vocab.json" in has:
            files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
            bpe = ByteLevelBPETokenizer(*files)
            ends = [(t, bpe.token_to_id(t)) for t in ("</s>", "<s>")]
            bpe._tokenizer.post_processor = RobertaProcessing(*ends)
            return bpe
    except Exception as e:  # the library raises bare Exceptions
        raise ModelError(f"{directory}: its tokenizer cannot be read: {e}") from e
    raise ModelError(f"{directory} has no tokenizer.json, vocab.txt or vocab.json")


def tokenise(tokenizer: Any, rows: Sequence[Row], length: int) -> list[Example]:
    """Every row as ids, cut to `length` tokens, the longer text first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch([r.texts if len(r.texts) > 1 else r.texts[0] for r in rows])
    return [Example(e.ids, e.type_ids, r.label) for e, r in zip(encoded, rows, strict=True)]
