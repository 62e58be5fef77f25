"""Batches of tokenised examples: seeded, resumable, bucketed by length, of few distinct shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from jaxtyping import Int

from experiments.common.tokens import Example, sizes, taken
from sharding import Zero
from sharding.cluster import global_batch, process_rows

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The lengths that batches may have, ascending; every batch has `batch` rows.

    A batch is as long as the first of `lengths` that holds its longest example, so a step is
    compiled once for each of them. `sides` are the lengths of a decoder's own side, if it has one.

    **Raises:** `ValueError` for no rows.
    """

    batch: int
    lengths: tuple[int, ...]
    sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch}: at least 1")

    def length(self, tokens: int) -> int:
        """The first length that holds `tokens`."""
        return _first(self.lengths, tokens)

    def side(self, tokens: int) -> int:
        """The first of `sides` that holds `tokens`."""
        return _first(self.sides, tokens)


def _first(lengths: Sequence[int], tokens: int) -> int:
    return next(n for n in lengths if n >= tokens)


def shapes(examples: Sequence[Any], batch: int, longest: int, buckets: int = 3) -> Shapes:
    """Shapes with few lengths, those that `quantiles` picks."""
    return Shapes(batch, quantiles(sizes(examples), longest, buckets))


def quantiles(sizes: Int[np.ndarray, " n"], longest: int, buckets: int = 3) -> tuple[int, ...]:
    """At most `buckets` lengths: even quantiles of the examples', rounded up to multiples of 8.

    **Raises:** `ValueError` for no buckets.
    """
    if buckets < 1:
        raise ValueError(f"--buckets {buckets}: batches need one length at least")
    sizes = np.sort(sizes)
    picks = [sizes[max(0, len(sizes) * i // buckets - 1)] for i in range(1, buckets + 1)]
    return tuple(sorted({min(longest, -(-int(n) // 8) * 8) for n in picks}))


@dataclasses.dataclass(frozen=True)
class Share:
    """What of every batch this process makes.

    **Attributes:** `batch`, the rows of all processes; `rows`, the numbers of its own, ascending,
    None where it makes all since it is alone; `where`, the sharding of the whole batch.
    """

    batch: int
    rows: Int[np.ndarray, " n"] | None = None
    where: jax.sharding.Sharding | None = None

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The part of a batch's numbers of examples; fewer than rows where the batch is short."""
        if self.rows is None:
            return numbers
        return numbers[self.rows[self.rows < len(numbers)]]

    @property
    def count(self) -> int:
        """How many rows it makes."""
        return self.batch if self.rows is None else len(self.rows)

    def placed(self, batch: Batch) -> Batch:
        """The whole batch on all devices, of which this process gives its rows."""
        return batch if self.where is None else global_batch(batch, self.where, self.batch)


def share_of(zero: Zero | None, batch: int) -> Share:
    """This process's share of batches of so many rows.

    **Raises:** `ValueError` in a job of several, for rows that devices cannot share evenly.
    """
    if zero is None or jax.process_count() == 1:
        return Share(batch)
    where = zero.batch({"input_ids": jax.ShapeDtypeStruct((batch,), np.int32)})["input_ids"]
    return Share(batch, process_rows(batch, where), where)


class Batches(grain.IterDataset[Batch]):
    """Endless training batches: every epoch a new order, each example once.

    Within an epoch, runs of `16 * batch` shuffled examples are sorted by length and cut into
    batches, whose order is shuffled again: like lengths share a batch, order stays random.
    Its iterator has `get_state` and `set_state`.

    **Arguments:** `examples`, each with its `ids`; `to_batch`, what makes a batch of some,
    `collate` where left out; `share`, what of each batch this process makes, all where left out.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        shapes: Shapes,
        pad: int,
        seed: int,
        to_batch: Callable[[Sequence[Any], Shapes, int], Batch] | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.examples, self.shapes, self.pad = examples, shapes, pad
        self.drawn = seed  # `seed` is a dataset's method
        self.to_batch = collate if to_batch is None else to_batch
        self.share = Share(shapes.batch) if share is None else share
        self.sizes = sizes(examples)

    def of(self, share: Share) -> Batches:
        """The same batches, of which this process makes its share."""
        return Batches(self.examples, self.shapes, self.pad, self.drawn, self.to_batch, share)

    @property
    def per_epoch(self) -> int:
        """Batches an epoch; the last one may be short, filled up with rows that do not count."""
        return -(-len(self.examples) // self.shapes.batch)

    def order(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches, as numbers of examples."""
        rng = np.random.default_rng((self.drawn, epoch))
        numbers = rng.permutation(len(self.examples))
        size, run = self.shapes.batch, 16 * self.shapes.batch
        out: list[np.ndarray] = []
        for start in range(0, len(numbers), run):
            part = numbers[start : start + run]
            part = part[np.argsort(self.sizes[part], kind="stable")]
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
        b, numbers = self.batches, self.order[self.position]
        self.position += 1
        return b.share.placed(made(b.examples, numbers, b.shapes, b.pad, b.share, b.to_batch))

    def get_state(self) -> dict[str, Any]:
        """A JSON-able state."""
        return {"epoch": self.epoch, "position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.order = self.batches.order(self.epoch)


def made(
    examples: Sequence[Any],
    numbers: np.ndarray,
    shapes: Shapes,
    pad: int,
    share: Share,
    to_batch: Callable[[Sequence[Any], Shapes, int], Batch],
) -> Batch:
    """A process's rows of a batch of the examples of these numbers, as long as the whole batch."""
    whole, own = numbers.tolist(), share.of(numbers).tolist()
    length, sides = shapes.length(int(sizes(examples, "ids", whole).max())), shapes.sides
    if sides:
        sides = (shapes.side(int(sizes(examples, "labels", whole).max())),)
    return to_batch(taken(examples, own), Shapes(share.count, (length,), sides), pad)


def collate(examples: Sequence[Example], shapes: Shapes, pad: int) -> Batch:
    """One batch, padded to a length of `shapes` and to its number of rows.

    `input_ids`, `attention_mask`, `token_type_ids`: int32 (rows, length); `labels`, `valid`:
    float32 (rows,). `valid` is 0 at rows that only fill up.
    """
    rows = shapes.batch
    length = shapes.length(max((len(e.ids) for e in examples), default=0))
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
    examples: Sequence[Example], shapes: Shapes, pad: int, share: Share | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example once, by length: the examples' numbers, and their batch.

    **Arguments:** `share`, what of each batch this process makes, all where left out.
    """
    share = Share(shapes.batch) if share is None else share
    numbers = np.argsort(sizes(examples), kind="stable")
    for start in range(0, len(numbers), shapes.batch):
        part = numbers[start : start + shapes.batch]
        yield part, share.placed(made(examples, part, shapes, pad, share, collate))
