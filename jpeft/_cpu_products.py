"""Products of a CPU, with gradients in the order of operands that it multiplies fastest."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# What a result that is worth keeping is known by, to `jpeft.models.layers.keep_products`.
KEPT = "jpeft_kept"
# A product that sums over no more numbers is made again sooner than kept.
CHEAP = 64


def dot(x: Any, y: Any, over: tuple[int, int], precision: Any, out: Any = None) -> Array:
    """Their product over one axis of each.

    **Arguments:** `out`, the type that sums in fp32 are rounded to; else all is in the operands'.
    """
    numbers = (((over[0],), (over[1],)), ((), ()))
    wide = None if out is None else jnp.promote_types(out, jnp.float32)
    z = jax.lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=wide)
    # Behind a barrier: XLA cannot run a product of bf16 in fp32 once it has turned it round.
    return z if z.dtype == x.dtype else jax.lax.optimization_barrier(z).astype(out)


def outer(
    x: Float[Array, "n k"], y: Float[Array, "n m"], precision: Any, out: Any = None
) -> Float[Array, "k m"]:
    """`x^T y`, for which the narrower of the two is turned round. `out`: as `dot`'s."""
    if x.shape[1] > y.shape[1]:
        return jax.lax.optimization_barrier(outer(y, x, precision, out)).T
    return dot(turned(x), y, (1, 0), precision, out)


def turned(x: Float[Array, "n k"]) -> Float[Array, "k n"]:
    """`x^T`, laid out anew: a transpose of two axes would be taken into the product, which then
    goes another, slower way.
    """
    n = x.shape[0]
    parts = next((i for i in range(2, math.isqrt(n) + 1) if n % i == 0), 1)
    apart = x.reshape(parts, n // parts, x.shape[1]).transpose(2, 0, 1)
    return jax.lax.optimization_barrier(apart.reshape(x.shape[1], n))


@jax.custom_vjp
def apart(x: Array) -> Array:
    """The same; its gradient is worked out by itself."""
    return x


apart.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def whole(
    x: Float[Array, "n k"], w: Any, axis: int, precision: Any, out: Any, frozen: bool
) -> Float[Array, "n m"]:
    """`x` times `w` over `w`'s axis `axis`.

    **Arguments:** `out`, as `dot`'s: what comes back is rounded to `x`'s type; `frozen`, nobody
    wants `w`'s gradient.
    """
    return dot(x, w, (1, axis), precision, out)


def _whole_forward(x: Any, w: Any, axis: int, precision: Any, out: Any, frozen: bool) -> Any:
    made = whole(x, w, axis, precision, out, frozen)
    return made if x.shape[1] <= CHEAP else checkpoint_name(made, KEPT), (x, w)


def _whole_backward(
    axis: int, precision: Any, out: Any, frozen: bool, saved: Any, g: Any
) -> tuple[Array, Array]:
    x, w = saved
    g = g.astype(x.dtype)
    out = None if out is None else x.dtype
    dx = dot(g, w, (1, 1 - axis), precision, out)
    dw = outer(*((x, g) if axis == 0 else (g, x)), precision, out)
    # By themselves: the compiler is not to turn the gradient round for whatever comes after. Both
    # together: an optimiser that moves the weight in place is to come after its last product.
    return (dx, dw) if frozen else jax.lax.optimization_barrier((dx, dw))


whole.defvjp(_whole_forward, _whole_backward)


def trained(x: Float[Array, "*b k"], w: Float[Array, "k m"]) -> Float[Array, "*b m"]:
    """`x w`, of a matrix that is trained."""
    return _trained(x, w, None)


def trained_short(x: Float[Array, "*b k"], w: Float[Array, "k m"]) -> Float[Array, "*b m"]:
    """The same, of bf16 by products of it with sums in fp32."""
    return _trained(x, w, x.dtype if x.dtype == jnp.bfloat16 else None)


def _trained(x: Array, w: Array, out: Any) -> Array:
    made: Any = whole(x.reshape(-1, x.shape[-1]), w, 0, None, out, False)
    return made.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def added(x: Float[Array, "*b d"], bias: Float[Array, "*c d"]) -> Float[Array, "*b d"]:
    """`x + bias`, where each axis of `bias` is as long as `x`'s or 1; its gradient is added up in
    fp32, as XLA for CPUs does not by itself.
    """
    return x + bias


def _added_backward(shape: tuple[int, ...], g: Array) -> tuple[Array, Array]:
    over = [i for i, n in enumerate(shape) if n != g.shape[i]]
    return g, jnp.sum(g.astype(jnp.float32), over, keepdims=True).astype(g.dtype)


added.defvjp(lambda x, bias: (x + bias, bias.shape), _added_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gathered(
    table: Array, at: Any, shape: tuple[int, ...], how: tuple[tuple[str, Any], ...]
) -> Array:
    """`table`'s slices `at`. The zeros that its gradient is added up in are made when what is to be
    added is there: XLA for CPUs else makes them first, and holds them through the backward pass.

    **Arguments:** `shape`, the table's; `how`, the parameters of JAX's `gather`.
    """
    return jax.lax.gather_p.bind(table, at, **dict(how))


def _gathered_backward(
    shape: tuple[int, ...], how: tuple[tuple[str, Any], ...], at: Any, g: Array
) -> tuple[Array, None]:
    p = dict(how)
    d = p["dimension_numbers"]
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=d.offset_dims,
        inserted_window_dims=d.collapsed_slice_dims,
        scatter_dims_to_operand_dims=d.start_index_map,
        operand_batching_dims=d.operand_batching_dims,
        scatter_indices_batching_dims=d.start_indices_batching_dims,
    )
    g, zero = jax.lax.optimization_barrier((g, jnp.zeros((), g.dtype)))
    same = {k: p[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
    return jax.lax.scatter_add(jnp.broadcast_to(zero, shape), at, g, numbers, **same), None


gathered.defvjp(
    lambda table, at, shape, how: (gathered(table, at, shape, how), at), _gathered_backward
)
