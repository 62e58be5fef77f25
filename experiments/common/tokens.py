"""Texts to token ids, by the tokenizer in a model's directory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import RobertaProcessing

from experiments.common.models import ModelError
from experiments.common.readers import Row
from sharding.cluster import measured

E = TypeVar("E")
Make = Callable[[Sequence[int]], list[E]]
CHUNK = 1024  # examples that are encoded at once where all are asked for


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
            end, start = ((t, bpe.token_to_id(t)) for t in ("</s>", "<s>"))
            bpe._tokenizer.post_processor = RobertaProcessing(end, start)
            return bpe
    except Exception as e:  # the library raises bare Exceptions
        raise ModelError(f"{directory}: its tokenizer cannot be read: {e}") from e
    raise ModelError(f"{directory} has no tokenizer.json, vocab.txt or vocab.json")


def tokenise(tokenizer: Any, rows: Sequence[Row], length: int) -> Sequence[Example]:
    """Every row as ids, cut to `length` tokens, the longer text first; see `encoded`."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def make(numbers: Sequence[int]) -> list[Example]:
        chosen = [rows[i] for i in numbers]
        texts = [r.texts if len(r.texts) > 1 else next(iter(r.texts)) for r in chosen]
        found = tokenizer.encode_batch(texts)
        return [Example(e.ids, e.type_ids, r.label) for e, r in zip(found, chosen, strict=True)]

    return encoded(make, len(rows))


class Later(Sequence[E]):
    """Examples that are encoded each time they are asked for, with sizes that are known.

    A process of several has the texts of all, and the ids of its own rows alone.

    **Arguments:** `make`, examples by their numbers; `sizes`, int32 `(n,)` by an example's field,
    how long that is.
    """

    def __init__(self, make: Make[E], sizes: Mapping[str, Int[np.ndarray, " n"]]) -> None:
        self.make, self.sizes = make, sizes

    def __len__(self) -> int:
        return len(self.sizes["ids"])

    def __getitem__(self, index: Any) -> Any:
        numbers = range(len(self))[index]
        return self.make(numbers) if isinstance(numbers, range) else self.make([numbers])[0]

    def __iter__(self) -> Iterator[E]:
        for start in range(0, len(self), CHUNK):
            yield from self.make(range(start, min(start + CHUNK, len(self))))


def encoded(
    make: Make[E], count: int, fields: tuple[str, ...] = ("ids",), longest: int | None = None
) -> Sequence[E]:
    """So many examples, less those that have a field of more than `longest`.

    One process encodes them here. Of several, each encodes a share here to tell all how long those
    are, and later its own rows of batches (`Later`).

    **Arguments:** `make`, examples by their numbers; `fields`, of an example, whose sizes count.
    """
    if jax.process_count() == 1:
        made = make(range(count))
        if longest is None:
            return made
        return [e for e in made if max(len(getattr(e, f)) for f in fields) <= longest]

    def of(numbers: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(numbers), len(fields)), np.int32)
        for start in range(0, len(numbers), CHUNK):
            for i, e in enumerate(make(numbers[start : start + CHUNK]), start):
                out[i] = [len(getattr(e, f)) for f in fields]
        return out

    found = measured(count, of)
    kept = np.arange(count)
    if longest is not None:
        kept = np.flatnonzero(found.max(1) <= longest)
    sizes = {f: found[kept, i] for i, f in enumerate(fields)}
    return Later(lambda numbers: make([int(kept[i]) for i in numbers]), sizes)


def sizes(
    examples: Sequence[Any], field: str = "ids", numbers: Sequence[int] | None = None
) -> Int[np.ndarray, " n"]:
    """How many tokens examples have: all of them, or those of some numbers."""
    if isinstance(examples, Later):
        found = examples.sizes[field]
        return found if numbers is None else found[list(numbers)]
    chosen = examples if numbers is None else taken(examples, numbers)
    return np.array([len(getattr(e, field)) for e in chosen], np.int32)


def taken(examples: Sequence[E], numbers: Sequence[int]) -> list[E]:
    """The examples of these numbers."""
    if isinstance(examples, Later):
        return examples.make(numbers)
    return [examples[i] for i in numbers]
