"""A CPU's product with a matrix that has a low-rank update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jpeft._cpu_products import KEPT, dot, outer, turned
from jpeft.lowrank import LowRank


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def summed(x: Float[Array, "n k"], leaf: LowRank, axis: int, precision: Any) -> Float[Array, "n m"]:
    """`x` times the sum over its axis `axis`, in the factors' type, rounded to `x`'s."""
    return dot(x.astype(leaf.a.dtype), _sum(leaf), (1, axis), precision).astype(x.dtype)


def _sum(leaf: LowRank) -> Array:
    """The dense sum, not rounded to the base's type: an update may be less than that can tell."""
    return dataclasses.replace(leaf, base=leaf.base.astype(leaf.a.dtype)).materialise()


def _summed_forward(x: Any, leaf: Any, axis: int, precision: Any) -> Any:
    return checkpoint_name(summed(x, leaf, axis, precision), KEPT), (x, leaf)


def _summed_backward(axis: int, precision: Any, saved: Any, g: Any) -> tuple[Array, LowRank]:
    x, leaf = saved
    short, product = x.dtype, functools.partial(dot, precision=precision)
    x, g = x.astype(leaf.a.dtype), g.astype(leaf.a.dtype)
    # The sum is formed again: kept from the forward pass it would be a copy of the weights.
    dx = product(g, _sum(leaf), (1, 1 - axis)).astype(short)
    d_base = outer(*((x, g) if axis == 0 else (g, x)), precision)  # none wants a frozen base's
    first, second = _factors(leaf, axis)
    up, low = leaf.scale * product(g, second, (1, 1)), leaf.scale * product(x, first, (1, 0))
    moves = _upright(product(turned(up), x, (1, 0))), product(turned(low), g, (1, 0))
    return dx, _cotangent(leaf, axis, d_base, *moves)


summed.defvjp(_summed_forward, _summed_backward)


def _factors(leaf: LowRank, axis: int) -> tuple[Float[Array, "k r"], Float[Array, "r m"]]:
    """What `x` meets first and what second, when it is multiplied over the base's axis `axis`."""
    return (leaf.b.T, leaf.a.T) if leaf.kinds[axis] == "o" else (leaf.a, leaf.b)


def _upright(wide: Float[Array, "r k"]) -> Float[Array, "k r"]:
    """The same turned round, which is kept out of the product that it comes from."""
    return jax.lax.optimization_barrier(wide).T


def _cotangent(leaf: LowRank, axis: int, base: Array, first: Array, second: Array) -> LowRank:
    a, b = (second.T, first.T) if leaf.kinds[axis] == "o" else (first, second)
    found = {"base": base.astype(leaf.base.dtype), "a": a.astype(leaf.a.dtype)}
    return dataclasses.replace(leaf, **found, b=b.astype(leaf.b.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def branched(
    x: Float[Array, "n k"], leaf: LowRank, axis: int, precision: Any, out: Any
) -> Float[Array, "n m"]:
    """The same on a base in bf16, for a processor that multiplies it: `x W + scale (x A) B`, each
    product of bf16, added in fp32 and rounded to `out`. The factors count in fp32.
    """
    first, second = (f.astype(jnp.float32) for f in _factors(leaf, axis))
    return _branched(x, leaf, (first, second), axis, precision, out)


def _branched(x: Any, leaf: Any, factors: Any, axis: int, precision: Any, out: Any) -> Array:
    first, second = factors
    low = leaf.scale * _narrow(x, first, precision)
    base = dot(x, leaf.base, (1, axis), precision, jnp.float32)
    return (base + dot(low, second, (1, 0), precision)).astype(out)


def _narrow(x: Any, factor: Any, precision: Any) -> Float[Array, "n r"]:
    """`x`, in bf16, times a factor in fp32; in fp32."""
    return _exactly(lambda a: dot(x, a, (1, 0), precision, jnp.float32), factor, 1)


def _exactly(product: Callable[[Array], Array], x: Float[Array, "i j"], axis: int) -> Array:
    """`product` of `x`, which takes bf16 alone: of it rounded, and of what that leaves out.

    **Arguments:** `product`, linear and in fp32, which leaves the axis `axis` of `x` where it is.
    """
    high = jax.lax.reduce_precision(x, 8, 7)
    both = jnp.concatenate([high, x - high], axis).astype(jnp.bfloat16)
    one, other = jnp.split(product(both), 2, axis)
    return one + other


def _branched_forward(x: Any, leaf: Any, axis: int, precision: Any, out: Any) -> Any:
    return checkpoint_name(branched(x, leaf, axis, precision, out), KEPT), (x, leaf)


def _branched_backward(
    axis: int, precision: Any, out: Any, saved: Any, g: Any
) -> tuple[Array, LowRank]:
    x, leaf = saved
    g = g.astype(x.dtype)
    first, second = (f.astype(jnp.float32) for f in _factors(leaf, axis))
    dx = _branched(g, leaf, (second.T, first.T), 1 - axis, precision, x.dtype)
    pair = (x, g) if axis == 0 else (g, x)
    d_base = outer(*pair, precision, jnp.float32)  # none wants a frozen base's

    def move(low: Array, y: Array) -> Array:
        return _exactly(lambda a: dot(a, y, (1, 0), precision, jnp.float32), turned(low), 0)

    up = leaf.scale * _narrow(g, second.T, precision)
    low = leaf.scale * _narrow(x, first, precision)
    moves = _upright(move(up, x)), move(low, g)
    return dx, _cotangent(leaf, axis, d_base, *moves)


branched.defvjp(_branched_forward, _branched_backward)
