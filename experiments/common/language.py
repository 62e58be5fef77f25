"""Pairs as batches of a language model, and its trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from experiments.common.pairs import Pair
from experiments.common.pipeline import Batch, Batches, Shapes, quantiles
from experiments.common.texts import Codec
from experiments.common.tokens import Later, encoded, sizes, taken
from experiments.common.training import Trainer, compiler_options
from jpeft.models.loss import IGNORED

Render = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One or, packed, several pairs: `ids`, what is read; `labels`, -100 where there is no loss, as
    long as `ids` for a decoder, else the decoder's side; `segments`, which pair each token is of.
    """

    ids: list[int]
    labels: list[int]
    segments: list[int]


def encode(
    pairs: Sequence[Pair], codec: Codec, render: Render, length: int, two_sided: bool
) -> tuple[Sequence[Tokens], int]:
    """Pairs as tokens, with how many were left out since they have more than `length`: cutting one
    would cut its answer. See `encoded` for when that is done.

    **Arguments:** `two_sided`, prompt to the encoder and answer to the decoder, else the answer
    follows the prompt. The loss is on the answer and its end.
    """

    def one(pair: Pair) -> Tokens:
        prompt = prompt_ids(pair.prompt, codec, render, two_sided)
        answer = [*codec.encode(pair.answer), codec.end]
        ids = prompt if two_sided else prompt + answer
        labels = answer if two_sided else [IGNORED] * len(prompt) + answer
        return Tokens(ids, labels, [1] * len(ids))

    def make(numbers: Sequence[int]) -> list[Tokens]:
        return [one(pairs[i]) for i in numbers]

    out = encoded(make, len(pairs), ("ids", "labels"), length)
    return out, len(pairs) - len(out)


def prompt_ids(prompt: str, codec: Codec, render: Render, two_sided: bool) -> list[int]:
    """What a model reads before it answers."""
    ids = [*codec.first, *codec.encode(render(prompt))]
    return [*ids, codec.end] if two_sided else ids


def packed(examples: Sequence[Tokens], length: int) -> Sequence[Tokens]:
    """Rows of up to `length` tokens, each of as many whole pairs as fit, the longest first.

    A pair's first token is never a label, so that none is foretold from another pair.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    lengths = sizes(examples).tolist()
    for number in sorted(range(len(examples)), key=lambda i: -lengths[i]):
        at = next((i for i, r in enumerate(room) if r >= lengths[number]), None)
        if at is None:
            rows.append([])
            room.append(length)
            at = len(rows) - 1
        rows[at].append(number)
        room[at] -= lengths[number]

    def make(numbers: Sequence[int]) -> list[Tokens]:
        return [_joined(taken(examples, rows[i])) for i in numbers]

    if not isinstance(examples, Later):
        return make(range(len(rows)))
    full = length - np.array(room, np.int32)
    return Later(make, {"ids": full, "labels": full})


def _joined(row: Sequence[Tokens]) -> Tokens:
    return Tokens(
        [i for e in row for i in e.ids],
        [x for e in row for x in (IGNORED, *e.labels[1:])],
        [n for n, e in enumerate(row, 1) for _ in e.ids],
    )


def batches(
    examples: Sequence[Tokens],
    codec: Codec,
    rows: int,
    length: int,
    seed: int,
    two_sided: bool,
    buckets: int = 3,
) -> Batches:
    """Endless training batches of few shapes: `input_ids`, `attention_mask`, `labels`, and for a
    decoder `segment_ids`.
    """

    def to_batch(chosen: Sequence[Tokens], of: Shapes, pad: int) -> Batch:
        width = of.length(max((len(e.ids) for e in chosen), default=0))
        side = width
        if two_sided:
            side = of.side(max((len(e.labels) for e in chosen), default=0))
        out = {
            "input_ids": np.full((of.batch, width), pad, np.int32),
            "attention_mask": np.zeros((of.batch, width), np.int32),
            "labels": np.full((of.batch, side), IGNORED, np.int32),
            "segment_ids": np.zeros((of.batch, width), np.int32),
        }
        for i, e in enumerate(chosen):
            n = len(e.ids)
            out["input_ids"][i, :n], out["attention_mask"][i, :n] = e.ids, 1
            out["labels"][i, : len(e.labels)] = e.labels
            out["segment_ids"][i, :n] = e.segments
        if two_sided:
            del out["segment_ids"]
        return out

    sides = quantiles(sizes(examples, "labels"), length, buckets) if two_sided else ()
    of = Shapes(rows, quantiles(sizes(examples), length, buckets), sides)
    return Batches(examples, of, codec.pad, seed, to_batch)


@dataclasses.dataclass(frozen=True)
class LanguageTrainer(Trainer):
    """A language model's trainer: the loss of next tokens.

    **Attributes:** `two_sided`, an encoder and a decoder; `virtual`, the virtual tokens before the
    input, and the first one's id; `start`, a trained state to go on from; `chunk`, see
    `next_token_loss`.
    """

    two_sided: bool = False
    virtual: tuple[int, int] = (0, 0)
    start: Any = None
    chunk: int = 1024

    def probe(self) -> Any:
        """How the model reads its parameters, looked up in it."""
        return language_uses(self.apply, self.params, self.two_sided)

    def first(self, params: Any) -> Any:
        """What is trained, at the start."""
        return super().first(params) if self.start is None else self.start

    @functools.cached_property
    def sums(self) -> Any:
        """Compiled: `sums(frozen, state, batch)`, the sum of the losses and their count."""

        def run(frozen: Any, state: Any, batch: Any) -> Any:
            return self.total(self.rewritten(frozen, state), batch)

        return jax.jit(run, compiler_options=compiler_options())

    def loss(self, rewritten: Any, batch: Any, key: Any) -> Any:
        """The sum over the batch's labels, and their number."""
        return self.total(rewritten, batch, key)

    def total(self, rewritten: Any, batch: Any, key: Any = None) -> tuple[Any, Any]:
        """The sum of the losses, and their count."""
        length, first = self.virtual
        own = ("input_ids", "attention_mask", *(() if self.two_sided else ("labels",)))
        rest = {k: batch[k] for k in ("labels", "segment_ids") if k in batch and k not in own}
        batch = {k: batch[k] for k in own}
        if length:
            batch = jpeft.virtual_tokens(batch, length=length, first=first)
            rest.pop("segment_ids", None)
        batch = {**batch, **rest}
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        return jpeft.lift(self.apply)(rewritten, ids, mask, key=key, chunk=self.chunk, **batch)


def language_uses(apply: Any, params: Any, two_sided: bool) -> Any:
    """How a language model reads its parameters."""
    ids = jnp.zeros((1, 8), jnp.int32)
    more = {"decoder_input_ids": ids} if two_sided else {}
    return jpeft.uses(apply, params, ids, **more)
