"""Training in two precisions: bf16 parameters with fp32 masters, or rounded at random without.

A bf16 number has 8 bits of fraction: an update below 2^-9 of a parameter is lost when it is added.
Two copies of the weights keep it (Micikevicius et al. 2018): the model reads bf16 ones, the
optimiser adds to fp32 masters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jpeft.paths import compiled, map_with_paths
from jpeft.quantized import Quantized


class MasterState(NamedTuple):
    """The fp32 `masters` of the parameters, and the `inner` optimiser's state."""

    masters: Any
    inner: Any


class RoundingState(NamedTuple):
    """How many `steps` were rounded, and the `inner` optimiser's state."""

    steps: Int[Array, ""] | Any
    inner: Any


def cast(tree: Any, dtype: Any, keep: str | Sequence[str] = ()) -> Any:
    """The tree with its real arrays in `dtype`; integers, keys and paths that match `keep` stay.

    A quantised weight is read in `dtype`; its codes and scales stay.
    """
    patterns = [compiled(p) for p in ([keep] if isinstance(keep, str) else keep)]

    def of(path: str, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if any(p.search(path) for p in patterns):
            return x
        if isinstance(x, Quantized):
            return dataclasses.replace(x, seen=jnp.dtype(dtype))
        return x.astype(dtype)

    return map_with_paths(of, tree, lambda x: isinstance(x, Quantized))


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a function of parameters computes in, for models that have no `dtype` of their own.

    **Arguments:** `compute`, what parameters and real inputs are cast to; `output`, what comes out;
    `keep`, patterns of parameters that stay as they are, such as norms'.
    """

    compute: Any = jnp.bfloat16
    output: Any = jnp.float32
    keep: str | Sequence[str] = ()

    def __call__(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """`apply(params, *args, **kwargs)` under this policy."""

        def under(params: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = _cast_arrays((args, kwargs), self.compute)
            out = apply(cast(params, self.compute, self.keep), *args, **kwargs)
            return _cast_arrays(out, self.output)

        return under


def master_weights(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser of bf16 (or fp16) parameters that keeps fp32 masters in its state.

    Gradients are cast to fp32, the optimiser updates the masters, and `optax.apply_updates` gives
    exactly the masters rounded to the parameters' type. What is in fp32 has a master too, equal to
    itself; parameters that nobody trains have neither master nor state.

    How it is exact: the updates are fp32, and `apply_updates` adds them in fp32 before it rounds.
    The difference of a rounded master and a parameter brings one to the other, except where a
    parameter shrinks to less than about 2^-16 of itself in one step: no fp32 number added to it
    reaches every bf16 number there. In that case the master moves to the sum that is reached, by
    at most 2^-24 of what the parameter was: less than fp32 itself lost when it made the update.

    **Raises:** `ValueError` by `update` without `params`.

    Source: Micikevicius et al. 2018, section 3.1.
    """

    def init(params: Any) -> MasterState:
        # Copies even of what is fp32: a step that donates its state must not find them twice.
        masters = jax.tree.map(jnp.copy, _wide(params))
        return MasterState(masters, optimiser.init(masters))

    def update(grads: Any, state: MasterState, params: Any = None) -> tuple[Any, MasterState]:
        _needed("master_weights", params)
        updates, inner = optimiser.update(_wide(grads), state.inner, state.masters)
        masters = optax.apply_updates(state.masters, updates)
        new = jax.tree.map(lambda m, p: m.astype(p.dtype), masters, params)
        updates = _towards(new, params)
        masters = jax.tree.map(_reached, masters, params, updates)
        return updates, MasterState(masters, inner)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _reached(master: Any, param: Any, update: Any) -> Any:
    """The master, or what the update reaches, where that is rounded to another number."""
    if not jnp.issubdtype(param.dtype, jnp.floating):
        return master
    total = (param + update).astype(jnp.float32)
    bits = jnp.dtype(f"uint{8 * jnp.dtype(param.dtype).itemsize}")

    def rounded(x: Any) -> Any:
        # As bits: a comparison of numbers may be made before they are rounded, or pass over the
        # smallest ones. Both zeros are one.
        seen = jax.lax.bitcast_convert_type(x.astype(param.dtype), bits)
        return jnp.where(seen << 1 == 0, 0, seen)

    return jnp.where(rounded(total) == rounded(master), master, total)


def stochastic_rounding(
    optimiser: optax.GradientTransformation, seed: int
) -> optax.GradientTransformation:
    """An optimiser of bf16 parameters without masters: their updates are rounded at random.

    The sum of parameter and update, in fp32, goes up or down to a bf16 number with the
    probabilities that make it right in the mean: an update that is too small to count is not lost,
    but counts sometimes. The optimiser's own state is in fp32. Parameters of other types are
    updated as ever.

    **Arguments:** `seed`, of the rounding: the state counts its steps, and holds nothing else.

    **Raises:** `ValueError` by `update` without `params`.

    Source: Gupta et al. 2015.
    """

    def init(params: Any) -> RoundingState:
        return RoundingState(jnp.zeros((), jnp.int32), optimiser.init(_wide(params)))

    def update(grads: Any, state: RoundingState, params: Any = None) -> tuple[Any, RoundingState]:
        _needed("stochastic_rounding", params)
        wide = _wide(params)
        updates, inner = optimiser.update(_wide(grads), state.inner, wide)
        sums, structure = jax.tree.flatten(optax.apply_updates(wide, updates))
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        new = [
            _rounded(jax.random.fold_in(key, i), x) if p.dtype == jnp.bfloat16 else x
            for i, (x, p) in enumerate(zip(sums, jax.tree.leaves(params), strict=True))
        ]
        updates = _towards(jax.tree.unflatten(structure, new), params)
        return updates, RoundingState(state.steps + 1, inner)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _rounded(key: Any, x: Float[Array, ...]) -> Float[Array, ...]:
    """`x`, fp32, rounded at random to a bf16 number."""
    # A bf16 is the upper half of an fp32: adding a random lower half carries with the right odds.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + jax.random.bits(key, x.shape, jnp.uint16)) & jnp.uint32(0xFFFF0000)
    drawn = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x), drawn, x).astype(jnp.bfloat16)


def _towards(new: Any, params: Any) -> Any:
    """Updates, in fp32, that take `params` to `new` when they are added in fp32."""
    return jax.tree.map(lambda n, p: n.astype(jnp.float32) - p.astype(jnp.float32), new, params)


def _wide(tree: Any) -> Any:
    return _cast_arrays(tree, jnp.float32)


def _cast_arrays(tree: Any, dtype: Any) -> Any:
    def of(x: Any) -> Any:
        real = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if real else x

    return jax.tree.map(of, tree)


def _needed(name: str, params: Any) -> None:
    if params is None:
        raise ValueError(f"{name}: pass the parameters to update(grads, state, params)")
