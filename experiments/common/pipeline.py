"""Batches of tokenised examples: seeded, resumable, bucketed by length, of few distinct shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from experiments.common.tokens import Example

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The lengths that batches may have, ascending; every batch has `batch` rows.

    A batch is as long as the first of `lengths` that holds its longest example, so a step is
    compiled once for each of them.
    """

    batch: int
    lengths: tuple[int, ...]

    def length(self, tokens: int) -> int:
        """The first length that holds `tokens`."""
        return next(n for n in self.lengths if n >= tokens)


def shapes(examples: Sequence[Example], batch: int, longest: int, buckets: int = 3) -> Shapes:
    """Lengths at even quantiles of the examples', rounded up to multiples of 8."""
    sizes = np.sort([len(e.ids) for e in examples])
    picks = [sizes[max(0, len(sizes) * i // buckets - 1)] for i in range(1, buckets + 1)]
    lengths = {min(longest, -(-int(n) // 8) * 8) for n in picks} | {min(longest, int(sizes[-1]))}
    top = max(lengths)
    return Shapes(batch, tuple(sorted({n for n in lengths if n == top or n % 8 == 0})))


class Batches(grain.IterDataset[Batch]):
    """Endless training batches: every epoch a new order, each example once.

    Within an epoch, runs of `16 * batch` shuffled examples are sorted by length and cut into
    batches, whose order is shuffled again: like lengths share a batch, order stays random.
    Its iterator has `get_state` and `set_state`.

    **Arguments:** `examples`, each with its `ids`; `to_batch`, what makes a batch of some,
    `collate` where left out.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        shapes: Shapes,
        pad: int,
        seed: int,
        to_batch: Callable[[Sequence[Any], Shapes, int], Batch] | None = None,
    ) -> None:
        super().__init__()
        self.examples, self.shapes, self.pad, self.seed = examples, shapes, pad, seed
        self.to_batch = collate if to_batch is None else to_batch

    @property
    def per_epoch(self) -> int:
        """Batches an epoch; the last one may be short, filled up with rows that do not count."""
        return -(-len(self.examples) // self.shapes.batch)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches, as numbers of examples."""
        rng = np.random.default_rng((self.seed, epoch))
        numbers = rng.permutation(len(self.examples))
        size, run = self.shapes.batch, 16 * self.shapes.batch
        out: list[np.ndarray] = []
        for start in range(0, len(numbers), run):
            part = numbers[start : start + run]
            part = part[np.argsort([len(self.examples[i].ids) for i in part], kind="stable")]
            out += [part[i : i + size] for i in range(0, len(part), size)]
        return [out[i] for i in rng.permutation(len(out))]

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)


class BatchIterator(grain.DatasetIterator[Batch]):
    """Where training stands in the data: an epoch, and a batch within it."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches, self.epoch, self.position = batches, 0, 0
        self.order = batches.order(0)

    def __next__(self) -> Batch:
        if self.position == len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self.batches.order(self.epoch)
        b = self.batches
        chosen = [b.examples[i] for i in self.order[self.position]]
        self.position += 1
        return b.to_batch(chosen, b.shapes, b.pad)

    def get_state(self) -> dict[str, Any]:
        """A JSON-able state."""
        return {"epoch": self.epoch, "position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.order = self.batches.order(self.epoch)


def collate(examples: Sequence[Example], shapes: Shapes, pad: int) -> Batch:
    """One batch, padded to a length of `shapes` and to its number of rows.

    `input_ids`, `attention_mask`, `token_type_ids`: int32 (rows, length); `labels`, `valid`:
    float32 (rows,). `valid` is 0 at rows that only fill up.
    """
    rows, length = shapes.batch, shapes.length(max(len(e.ids) for e in examples))
    out = {
        "input_ids": np.full((rows, length), pad, np.int32),
        "attention_mask": np.zeros((rows, length), np.int32),
        "token_type_ids": np.zeros((rows, length), np.int32),
        "labels": np.zeros(rows, np.float32),
        "valid": np.zeros(rows, np.float32),
    }
    for i, e in enumerate(examples):
        n = len(e.ids)
        out["input_ids"][i, :n], out["attention_mask"][i, :n] = e.ids, 1
        out["token_type_ids"][i, :n] = e.segments
        out["labels"][i], out["valid"][i] = e.label, 1
    return out


def in_order(
    examples: Sequence[Example], shapes: Shapes, pad: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, by length: the examples' numbers, and their batch."""
    numbers = np.argsort([len(e.ids) for e in examples], kind="stable")
    for start in range(0, len(numbers), shapes.batch):
        part = numbers[start : start + shapes.batch]
        yield part, collate([examples[i] for i in part], shapes, pad)
