"""Demonstrations for in-context learning: drawn, ordered, mislabelled, and put before a query."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.common.readers import Row
from experiments.common.texts import Codec
from experiments.common.wordings import Wording


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads, and what may follow: `labels`, each label's own tokens, at least one."""

    ids: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]


def query(row: Row, wording: Wording, codec: Codec) -> Prompt:
    """A text in a template. What all labels' words begin with alike belongs to the prompt."""
    whole = [codec.encode(wording.text(row.texts, i)) for i in range(len(wording.words))]
    shortest = min(len(ids) for ids in whole)
    alike = next((i for i in range(shortest) if len({ids[i] for ids in whole}) > 1), shortest)
    alike = min(alike, shortest - 1)  # a word may be another one's beginning
    return Prompt(tuple(whole[0][:alike]), tuple(tuple(ids[alike:]) for ids in whole))


def demonstration(row: Row, wording: Wording, codec: Codec) -> list[int]:
    """A text in a template with its label's word."""
    return codec.encode(wording.text(row.texts, int(row.label)) + wording.end)


def tokens_of(prompt: Prompt) -> int:
    """The most tokens that are read of a prompt: with the longest label, but its last token."""
    return len(prompt.ids) + max(len(label) for label in prompt.labels) - 1


def after(prompt: Prompt, shown: Sequence[Row], wording: Wording, codec: Codec) -> Prompt:
    """A query after demonstrations, from the beginning of a text."""
    ids = [i for row in shown for i in demonstration(row, wording, codec)]
    return Prompt((*codec.first, *ids, *prompt.ids), prompt.labels)


def drawn(rows: Sequence[Row], k: int, classes: int, seed: int) -> list[Row] | None:
    """`k` different rows in a random order, of every class as many as of another, give or take
    one; None where there are not enough.
    """
    rng = np.random.default_rng((seed, k))
    counts = np.full(classes, k // classes)
    counts[rng.permutation(classes)[: k % classes]] += 1
    chosen: list[Row] = []
    for label, count in enumerate(counts):
        own = [r for r in rows if int(r.label) == label]
        if len(own) < count:
            return None
        chosen += [own[i] for i in rng.choice(len(own), count, replace=False)]
    return [chosen[i] for i in rng.permutation(k)]


def orders(rows: Sequence[Row], count: int, seed: int) -> list[list[Row]]:
    """The same rows in up to `count` different orders, the given one among them."""
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {tuple(range(len(rows))): None}
    while len(found) < min(count, math.factorial(len(rows))):
        found.setdefault(tuple(rng.permutation(len(rows)).tolist()))
    return [[rows[i] for i in order] for order in found]


def with_random_labels(rows: Sequence[Row], classes: int, seed: int) -> list[Row]:
    """The rows with labels drawn uniformly, the right ones among them (Min et al. 2022)."""
    labels = np.random.default_rng((seed, 1)).integers(classes, size=len(rows))
    return [
        dataclasses.replace(r, label=float(label)) for r, label in zip(rows, labels, strict=True)
    ]
