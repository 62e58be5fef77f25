"""Compiled pre-training: many steps a call, that draw their own batches on the device."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.common.pretrain_objectives import Objective
from experiments.common.scale import Scale
from experiments.common.training import compiler_options
from jpeft.paths import path_string
from sharding import State, Step, make_step

# What decays: matrices, and words' embeddings.
_DECAYED = r"/kernel$|(word_embeddings|embed_tokens|shared)/embedding$"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """AdamW with a warm-up, then a cosine's decay to a twentieth; clipping by the global norm."""

    rate: float
    steps: int
    warmup: float = 0.05
    decay: float = 0.05
    clip: float = 1.0

    def optimiser(self) -> optax.GradientTransformation:
        """The optax chain, without the clipping."""
        warm = min(max(1, round(self.steps * self.warmup)), self.steps - 1)
        rate = optax.warmup_cosine_decay_schedule(
            self.rate / max(1, warm), self.rate, warm, self.steps, self.rate / 20
        )
        return optax.adamw(rate, b2=0.98, weight_decay=self.decay, mask=_decayed)


def _decayed(params: Any) -> Any:
    def of(path: Any, x: Any) -> bool:
        del x
        return re.search(_DECAYED, path_string(path)) is not None

    return jax.tree_util.tree_map_with_path(of, params)


@dataclasses.dataclass(frozen=True)
class Pretrainer:
    """An objective and a schedule, compiled.

    A step's batch and masks are drawn from the seed and the step's number alone: a run that was cut
    goes on with those that it would have had.

    **Arguments:** `rows`, of a batch; `train` and `validation`, the streams.

    **Attributes:** `step`, one training step; `trainable`, what it trains, at the start.

    **Raises:** `ValueError` for streams that are shorter than a row.
    """

    objective: Objective
    schedule: Schedule
    rows: int
    train: Any
    validation: Any
    seed: int = 0
    scale: Scale = Scale()
    step: Step = dataclasses.field(init=False)
    stream: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        window = self.objective.window
        for name in ("train", "validation"):
            size = len(getattr(self, name))
            if size < window:
                raise ValueError(
                    f"the {name} texts have {size} tokens, and a row is of {window}: give longer "
                    "texts, or a lower --length"
                )
        zero = self.scale.zero()
        # Its options are those of the program that it is a part of.
        step = make_step(
            self._loss,
            self.scale.optimiser(self.schedule.optimiser(), self.seed),
            zero=zero,
            axes=self.objective.axes,
            clip=self.schedule.clip,
            dtype=self.scale.kept,
            keep=r"/embedding$",
        )
        stream = jnp.asarray(self.train)
        object.__setattr__(self, "step", step)
        object.__setattr__(
            self, "stream", stream if zero is None else jax.device_put(stream, zero.replicated)
        )

    def init(self) -> State:
        """The state at the start."""
        return self.step.init(self.objective.params)

    def steps(self, state: State, count: int) -> tuple[State, Float[Array, " n"]]:
        """So many steps in one program: the state, which replaces the one that went in, and each
        step's loss, in nats.
        """
        # The key is an argument: it is one program for all seeds.
        return self._many(count)(state, self.stream, jax.random.key(self.seed))

    def held_out_loss(self, state: State, most: int) -> tuple[float, int]:
        """Nats a label over rows of validation, and how many labels, always the same.

        **Arguments:** `most`, rows, as many of which are taken as make whole batches.
        """
        window, n = self.objective.window, len(self.validation)
        count = min(most, n // window)
        batch = min(self.rows, count)
        count -= count % batch
        # The whole of it, evenly.
        starts = np.linspace(0, n - window, count).astype(int)
        rows = self.validation[starts[:, None] + np.arange(window)]
        batches = jnp.asarray(rows.reshape(-1, batch, window), jnp.int32)
        total, labels = self._evaluate(state.trainable, batches, jax.random.key(0))
        return float(total) / max(float(labels), 1), int(labels)

    # -- the programs ------------------------------------------------------------------------

    @functools.cached_property
    def _evaluate(self) -> Callable[[Any, Any, Any], Any]:
        def evaluate(params: Any, batches: Int[Array, "n b t"], key: PRNGKeyArray) -> Any:
            def one(sums: Any, at: Any) -> Any:
                found = self.objective.loss(params, at[0], at[1])
                return jax.tree.map(lambda a, b: a + b, sums, found), None

            keys = jax.random.split(key, len(batches))
            start = (jnp.float32(0), jnp.zeros((), jnp.int32))
            return jax.lax.scan(one, start, (batches, keys))[0]

        return jax.jit(evaluate, compiler_options=compiler_options())

    def _many(self, count: int) -> Any:
        cached: dict[int, Any] = self.__dict__.setdefault("_programs", {})
        if count not in cached:

            def many(state: State, stream: Any, key: PRNGKeyArray) -> Any:
                def one(state: State, _: None) -> Any:
                    number = jax.random.fold_in(key, state.step)
                    state, metrics = self.step(state, stream, {}, number)
                    return state, metrics["loss"]

                return jax.lax.scan(one, state, None, length=count)

            shapes = jax.eval_shape(lambda: self.objective.params)
            where = self.step.shardings(shapes)
            cached[count] = jax.jit(
                many,
                donate_argnums=0,
                out_shardings=None if where is None else (where, where.step),
                compiler_options=compiler_options(),
            )
        return cached[count]

    def _loss(self, params: Any, stream: Any, batch: Any, key: PRNGKeyArray) -> Any:
        """The loss of a batch that is drawn here."""
        del batch
        where, how = jax.random.split(key)
        window = self.objective.window
        starts = jax.random.randint(where, (self.rows,), 0, stream.shape[0] - window + 1)
        rows = stream[starts[:, None] + jnp.arange(window)].astype(jnp.int32)
        if self.step.zero is not None:
            rows = jax.lax.with_sharding_constraint(rows, self.step.zero.batch(rows))
        return self.objective.loss(params, rows, how)
