"""T5's span corruption, drawn within a compiled program."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from experiments.common.pretrain_tokens import SENTINELS, Vocabulary

DENSITY, MEAN = 0.15, 3.0


@dataclasses.dataclass(frozen=True)
class Spans:
    """The numbers of tokens of a corruption.

    **Attributes:** `window`, of the text; `noise`, of them that are taken out, in `count` spans.
    """

    window: int
    noise: int
    count: int

    @property
    def inputs(self) -> int:
        """What the encoder reads of the text: what is left, and a sentinel a span."""
        return self.window - self.noise + self.count

    @property
    def targets(self) -> int:
        """What the decoder is to write: the spans, a sentinel before each, and the end."""
        return self.noise + self.count + 1


def spans_of(window: int) -> Spans:
    """The numbers for so many tokens of text.

    Source: `random_spans_noise_mask` of T5's code (Raffel et al. 2020, section 3.1.4).
    """
    noise = min(max(round(window * DENSITY), 1), window - 1)
    return Spans(window, noise, max(round(noise / MEAN), 1))


def longest_window(inputs: int) -> Spans:
    """As much text as fills so many inputs, and no more.

    **Raises:** `ValueError` for inputs without room for a span, or with more spans than sentinels.
    """
    if inputs < 3:
        raise ValueError(f"{inputs} tokens have no room for a span, its sentinel and a word")
    window = 2
    while spans_of(window + 1).inputs <= inputs:
        window += 1
    found = spans_of(window)
    if found.count > SENTINELS:
        raise ValueError(f"{inputs} tokens have {found.count} spans, for {SENTINELS} sentinels")
    return found


class Corrupted(NamedTuple):
    """`inputs`, the text with a sentinel for each span; `targets`, sentinels and spans, the end."""

    inputs: Int[Array, "b s"]
    targets: Int[Array, "b t"]


def noise_mask(rows: int, spans: Spans, key: PRNGKeyArray) -> Bool[Array, "b n"]:
    """Which tokens are taken out. Spans alternate, the first is kept and the last is not; their
    lengths are drawn so that each way to cut the numbers is as likely as another.

    Source: as `spans_of`'s.
    """
    first, second = jax.random.split(key)
    noise = _cut(spans.noise, spans.count, rows, first)
    kept = _cut(spans.window - spans.noise, spans.count, rows, second)
    # Lengths in turn; a place's parity tells which kind it is in.
    ends = jnp.cumsum(jnp.stack([kept, noise], axis=2).reshape(rows, -1), axis=1)
    place = jnp.arange(spans.window)
    return jnp.sum(place[:, None] >= ends[:, None, :], axis=2) % 2 == 1


def _cut(total: int, parts: int, rows: int, key: PRNGKeyArray) -> Int[Array, "b k"]:
    """`total` as a sum of so many positive numbers, at random."""
    marks = jnp.broadcast_to(jnp.arange(total - 1) < parts - 1, (rows, total - 1))
    marks = jax.random.permutation(key, marks, axis=1, independent=True)
    begin = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), marks.astype(jnp.int32)], axis=1)
    part = jnp.cumsum(begin, axis=1)
    return jnp.sum(part[:, :, None] == jnp.arange(parts), axis=1)


def corrupted(
    ids: Int[Array, "b n"], spans: Spans, vocabulary: Vocabulary, key: PRNGKeyArray
) -> Corrupted:
    """Rows of text with spans taken out, and what was.

    The i-th span is the i-th sentinel in the inputs, and follows it in the targets.

    Source: Raffel et al. 2020, section 3.1.4 and figure 2.
    """
    noise = noise_mask(ids.shape[0], spans, key)
    end = jnp.full((ids.shape[0], 1), vocabulary.end, ids.dtype)
    targets = _replaced(ids, ~noise, spans.targets - 1, vocabulary)
    inputs = _replaced(ids, noise, spans.inputs, vocabulary)
    return Corrupted(inputs, jnp.concatenate([targets, end], axis=1))


def _replaced(
    ids: Int[Array, "b n"], out: Bool[Array, "b n"], size: int, vocabulary: Vocabulary
) -> Int[Array, "b m"]:
    """Each run of `out` as one sentinel, in order; `size` tokens a row are left."""
    begins = out & ~jnp.pad(out, ((0, 0), (1, 0)))[:, :-1]
    number = jnp.cumsum(begins, axis=1) - 1
    marked = jnp.where(begins, vocabulary.sentinel(0) - number, ids)
    # Stable: what stays comes first, in its order.
    order = jnp.argsort(out & ~begins, axis=1, stable=True)[:, :size]
    return jnp.take_along_axis(marked, order, axis=1).astype(ids.dtype)
