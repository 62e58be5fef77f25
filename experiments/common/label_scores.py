"""The log-likelihoods of labels' words after prompts, many at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

import jpeft
from experiments.common.shots import Prompt

Normalise = Literal["sum", "mean"]


class _Picked(nnx.Module):
    """A decoder whose head reads some positions alone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, ids: Int[Array, "b t"], mask: Int[Array, "b t"], at: Int[Array, "b n"]
    ) -> Float[Array, "b n v"]:
        x = self.model(ids, mask, hidden=True)
        return self.model.head(jnp.take_along_axis(x, at[..., None], axis=1))


class _Row(NamedTuple):
    """What is read at once: `ids`; and of each token whose probability is asked for, `at`, where
    it is foretold, `tokens`, which it is, and `labels`, of which label.
    """

    prompt: int
    ids: tuple[int, ...]
    at: tuple[int, ...]
    tokens: tuple[int, ...]
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A decoder that tells how likely labels are; one program for each length.

    **Arguments:** `batch`, rows at a time; `lengths`, that rows are padded to, ascending; `pad`, a
    token; `normalise`, whether a label's log-likelihood is the sum over its tokens or their mean.
    """

    model: dataclasses.InitVar[Any]
    batch: int
    lengths: tuple[int, ...]
    pad: int
    normalise: Normalise = "sum"
    _run: Callable[..., Any] = dataclasses.field(init=False)

    def __post_init__(self, model: Any) -> None:
        apply, _ = jpeft.functional(_Picked(model))
        picked = jpeft.lift(lambda params, *rest: apply({"model": params}, *rest))

        def run(params: Any, ids: Any, mask: Any, at: Any, tokens: Any) -> Any:
            likelihoods = jax.nn.log_softmax(picked(params, ids, mask, at), axis=-1)
            return jnp.take_along_axis(likelihoods, tokens[..., None], axis=-1)[..., 0]

        object.__setattr__(self, "_run", jax.jit(run))

    def __call__(
        self, params: Any, prompts: Sequence[Prompt]
    ) -> tuple[Float[np.ndarray, "n c"], float]:
        """Log-likelihoods in nats, and the tokens that are read for a prompt, without padding.

        **Arguments:** `params`, the model's parameters, ordinary or rewritten by a method.

        **Raises:** `ValueError` for a prompt longer than the longest length.
        """
        rows = [row for i, p in enumerate(prompts) for row in _rows(i, p)]
        longest = max(len(r.ids) for r in rows)
        if longest > self.lengths[-1]:
            raise ValueError(f"a prompt has {longest} tokens, the model reads {self.lengths[-1]}")
        rows.sort(key=lambda r: len(r.ids))
        slots = max(len(r.tokens) for r in rows)
        out = np.zeros((len(prompts), len(prompts[0].labels)))
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            found = np.asarray(self._run(params, *self._padded(part, slots)))
            for row, values in zip(part, found, strict=False):
                np.add.at(out[row.prompt], list(row.labels), values[: len(row.labels)])
        if self.normalise == "mean":
            out /= [[len(label) for label in p.labels] for p in prompts]
        return out, sum(len(r.ids) for r in rows) / len(prompts)

    def _padded(self, rows: Sequence[_Row], slots: int) -> tuple[np.ndarray, ...]:
        width = next(n for n in self.lengths if n >= len(rows[-1].ids))
        ids = np.full((self.batch, width), self.pad, np.int32)
        mask, at, tokens = (np.zeros((self.batch, n), np.int32) for n in (width, slots, slots))
        mask[:, 0] = 1  # rows that fill up read something too
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = row.ids, 1
            at[i, : len(row.at)], tokens[i, : len(row.at)] = row.at, row.tokens
        return ids, mask, at, tokens


def _rows(number: int, prompt: Prompt) -> list[_Row]:
    """One row where every label is one token, else one a label."""
    last = len(prompt.ids) - 1
    if all(len(label) == 1 for label in prompt.labels):
        tokens = tuple(label[0] for label in prompt.labels)
        return [_Row(number, prompt.ids, (last,) * len(tokens), tokens, tuple(range(len(tokens))))]
    return [
        _Row(
            number,
            (*prompt.ids, *label[:-1]),
            tuple(range(last, last + len(label))),
            label,
            (i,) * len(label),
        )
        for i, label in enumerate(prompt.labels)
    ]


def lengths(longest: int, least: int = 16) -> tuple[int, ...]:
    """Halves of the longest length, down to about `least`."""
    found = [longest]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(reversed(found))
