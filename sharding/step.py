"""A compiled training step of any loss: accumulation, clipping, and steps that are not numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sharding.agreement import check_agreement
from sharding.cluster import everywhere
from sharding.gather import Placed, gathered
from sharding.offload import HOST, Offloaded, on_host
from sharding.parts import in_parts
from sharding.zero import STACKED, Axes, Zero, path_string

# `loss(trainable, frozen, batch, key)`: the mean, or the sum and the number that it is over.
Loss = Callable[[Any, Any, Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes, and a checkpoint holds.

    **Attributes:** `step`, how many were taken, the skipped ones too; `trainable`; `optimiser`, its
    state; `skipped`, how many had a gradient that was not finite.
    """

    step: Int[Array, ""] | Any
    trainable: Any
    optimiser: Any
    skipped: Int[Array, ""] | Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step: `step(state, frozen, batch, key) -> (state, metrics)`.

    `state` is donated: the one that went in is gone. Frozen parameters are an argument, so that
    they are never constants of the program. `metrics` are fp32 scalars: `loss`, the mean over the
    batch; `grad_norm`, before clipping; `skipped`, 1 where that norm was not finite and the state,
    but for its counters, stayed as it was. Numbers of about 1e19 are too large for it: fp32 does
    not hold their squares.

    **Arguments:** as `make_step`'s.
    """

    loss: Loss
    optimiser: optax.GradientTransformation
    zero: Zero | None = None
    axes: Axes | None = None
    accumulate: int = 1
    clip: float | None = None
    dtype: Any = None
    keep: str | Sequence[str] = ()
    compiler_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate counts parts of a batch, at least 1: {self.accumulate}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, or None: {self.clip}")

    def init(self, trainable: Any) -> State:
        """The state at the start, each array where the stage has it.

        `trainable`'s arrays are copied: a step that eats the state leaves them be. Of several
        processes each passes all of them, whole.

        **Raises:** `ValueError` for arrays that are not the same in every process.
        """
        where = self.shardings(jax.eval_shape(lambda x: x, trainable))
        if where is not None:
            check_agreement(trainable, where.step)
            trainable = everywhere(trainable, where.trainable)
        return jax.jit(self._start, out_shardings=where)(trainable)

    def abstract(self, trainable: Any) -> State:
        """The state's shapes, with shardings, from the shapes of what is trained."""
        state = jax.eval_shape(self._start, trainable)
        where = self.shardings(trainable)
        if where is None:
            return state
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
        )

    def shardings(self, trainable: Any) -> Any:
        """The state's shardings, from what is trained or its shapes; None without a mesh."""
        if self.zero is None:
            return None
        state = jax.eval_shape(self.optimiser.init, trainable)
        where = self.zero.optimiser(state, trainable, self.axes)
        if isinstance(self.optimiser, Offloaded):
            hosted = on_host(self.optimiser, trainable)
            where = jax.tree.map(lambda s, h: s.with_memory_kind(HOST) if h else s, where, hosted)
        return State(
            self.zero.replicated,
            self.zero.parameters(trainable, self.axes),
            where,
            self.zero.replicated,
        )

    def __call__(
        self, state: State, frozen: Any, batch: Any, key: PRNGKeyArray | None = None
    ) -> tuple[State, dict[str, Float[Array, ""]]]:
        """One step.

        **Arguments:** `batch`, all rows, the same in every process, which is not looked into; or
        global arrays, `sharding.cluster.global_batch` of each process's own rows. `key`, of this
        step, for what is random in the loss, the same in every process.

        **Raises:** `ValueError` for a batch whose rows do not divide over devices and parts.
        """
        if self.zero is not None:
            batch = everywhere(batch, self.zero.batch(batch, self.accumulate))
        return self._compiled(state)(state, frozen, batch, key)

    def lower(self, state: Any, frozen: Any, batch: Any, key: Any = None) -> jax.stages.Lowered:
        """The step for arrays, or `jax.ShapeDtypeStruct`s with shardings, ready to compile."""
        return self.trace(state, frozen, batch, key).lower()

    def trace(self, state: Any, frozen: Any, batch: Any, key: Any = None) -> Any:
        """What `lower` lowers, a `jax.stages.Traced`, with the step's program in JAX's terms."""
        return self._compiled(state).trace(state, frozen, batch, key)

    # -- the program -------------------------------------------------------------------------

    def _start(self, trainable: Any) -> State:
        zero = jnp.zeros((), jnp.int32)
        patterns = [self.keep] if isinstance(self.keep, str) else self.keep
        paths = [path_string(p) for p, _ in jax.tree_util.tree_flatten_with_path(trainable)[0]]
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(f"keep='{pattern}' matches none of the {len(paths)} trained paths")

        def kept(path: Any, x: Any) -> Any:
            real = jnp.issubdtype(x.dtype, jnp.floating) and self.dtype is not None
            if not real or any(re.search(p, path_string(path)) for p in patterns):
                return jnp.copy(x)
            return x.astype(self.dtype)

        # The optimiser first: masters are of what was given, not of what it is rounded to.
        made = self.optimiser.init(trainable)
        inside = not isinstance(self.optimiser, Offloaded)
        if inside and any(jax.tree.leaves(on_host(self.optimiser, trainable))):
            raise ValueError(
                "offloaded(...) stands within another transformation, which would compute with "
                "arrays that are not on the device: put it outermost, offloaded(...(optimiser))"
            )
        return State(zero, jax.tree_util.tree_map_with_path(kept, trainable), made, zero)

    def _compiled(self, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state.trainable)
        this = (structure, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves))
        cached: dict[Any, Any] = self.__dict__.setdefault("_programs", {})
        if this not in cached:
            where = self.shardings(jax.eval_shape(lambda x: x, state.trainable))
            options = self.compiler_options
            cached[this] = jax.jit(
                self._step,
                donate_argnums=0,
                out_shardings=None if self.zero is None else (where, self.zero.replicated),
                compiler_options=None if options is None else dict(options),
            )
        return cached[this]

    def _step(self, state: State, frozen: Any, batch: Any, key: Any) -> Any:
        value, grads = self._gradients(state.trainable, frozen, batch, key)
        if self.zero is not None:
            where = self.zero.reduced(grads, self.axes)
            grads = jax.lax.with_sharding_constraint(grads, where)
        norm = optax.tree.norm(jax.tree.map(_wide, grads)).astype(jnp.float32)
        if self.clip is not None:
            factor = self.clip / jnp.maximum(norm, self.clip)
            grads = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        finite = jnp.isfinite(norm)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        given = grads, state.optimiser, state.trainable
        if isinstance(self.optimiser, Offloaded):  # what is on the host is kept before it is there
            stacked = STACKED if self.zero is None else self.zero.stacked
            trainable, optimiser = self.optimiser.apply(*given, finite, stacked)
        else:
            updates, optimiser = self.optimiser.update(*given)
            optimiser = kept(optimiser, state.optimiser)
            trainable = kept(optax.apply_updates(state.trainable, updates), state.trainable)
        state = State(
            state.step + 1,
            trainable,
            optimiser,
            state.skipped + jnp.where(finite, 0, 1),
        )
        skipped = jnp.where(finite, jnp.float32(0), jnp.float32(1))
        return state, {"loss": value, "grad_norm": norm, "skipped": skipped}

    def _gradients(self, trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        """The mean loss over the batch, and its gradients."""
        if self.accumulate == 1:

            def mean(trainable: Any) -> Any:
                total, count = self._total(trainable, frozen, batch, key)
                return total / _divisor(count)

            return jax.value_and_grad(mean)(trainable)
        parts = in_parts(batch, self.accumulate, self.zero)
        keys = None if key is None else jax.random.split(key, self.accumulate)

        def total(trainable: Any, part: Any, key: Any) -> tuple[Any, Any]:
            return self._total(trainable, frozen, part, key)

        def add(sums: Any, xs: Any) -> tuple[Any, None]:
            (value, count), grads = jax.value_and_grad(total, has_aux=True)(trainable, *xs)
            grads = self._summed(jax.tree.map(_wide, grads))
            new = jax.tree.map(jnp.add, sums, (value, count, grads))
            return new, None

        zeros = self._summed(jax.tree.map(lambda x: _wide(jnp.zeros_like(x)), trainable))
        start = (jnp.float32(0), jnp.float32(0), zeros)
        (value, count, grads), _ = jax.lax.scan(add, start, (parts, keys))
        count = _divisor(count)
        return value / count, jax.tree.map(lambda g: g / count, grads)

    def _summed(self, grads: Any) -> Any:
        if self.zero is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, self.zero.gradients(grads, self.axes))

    def _total(self, trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        loss = self.loss if self.zero is None else gathered(self.loss, self._placed)
        out = loss(trainable, frozen, batch, key)
        total, count = out if isinstance(out, tuple) else (out, 1)
        return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)

    def _placed(self, trainable: Any, frozen: Any, batch: Any, key: Any) -> list[Placed | None]:
        """How the arrays of the loss's arguments stand, in order."""
        assert self.zero is not None
        zero, axes = self.zero, self.axes
        # Where parts of a batch are summed, stage 1 sums whole gradients.
        summed = zero.gradients if self.accumulate > 1 else zero.reduced
        trees = (zero.parameters, zero.used, summed)
        own = [jax.tree.leaves(of(trainable, axes)) for of in trees]
        base = [jax.tree.leaves(of(frozen, axes)) for of in trees[:2]]
        placed = [Placed(*x) for x in zip(*own, strict=True)]
        placed += [Placed(*x) for x in zip(*base, strict=True)]
        split = [p if _is_split(p) else None for p in placed]
        return [*split, *[None] * len(jax.tree.leaves((batch, key)))]


def _wide(x: Any) -> Any:
    """In fp32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _divisor(count: Any) -> Any:
    """What a sum over so many is divided by: a sum over none is 0, whatever divides it."""
    return jnp.where(count > 0, count, 1)


def _is_split(placed: Placed) -> bool:
    """Whether there is anything to gather or to scatter."""
    return placed.stored != placed.used or placed.gradient not in (None, placed.used)


def make_step(
    loss: Loss,
    optimiser: optax.GradientTransformation,
    *,
    zero: Zero | None = None,
    axes: Axes | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: Any = None,
    keep: str | Sequence[str] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> Step:
    """A training step.

    **Arguments:**

    - `loss(trainable, frozen, batch, key)`, a scalar mean, or a pair: a sum, and the number that it
      is over (tokens). With the pair, parts of a batch weigh by their numbers, as in one piece.
    - `optimiser`, any of optax; `offloaded(optimiser)` for a state in the host's memory.
    - `zero`, where arrays stand; None for one device.
    - `axes`, the names of the axes of what is trained.
    - `accumulate`, take a batch in so many parts, one after another, and sum their gradients, in
      fp32.
    - `clip`, the most that the gradient's global norm may be.
    - `dtype`, what real trained arrays are kept in, after the optimiser's state was made of those
      that `init` is given: bf16, with an optimiser that has fp32 masters. None leaves them.
    - `keep`, patterns of paths that `dtype` leaves too: tables that rows are looked up in, whose
      gradients are sums over tokens, and GPUs add bf16 numbers to one place very slowly.
    - `compiler_options`, for XLA.

    **Raises:** `ValueError` for numbers that are too small; `init`, for a pattern of `keep` that
    matches nothing, or `offloaded` within another transformation.
    """
    return Step(loss, optimiser, zero, axes, accumulate, clip, dtype, keep, compiler_options)
