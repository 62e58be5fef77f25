"""LLM.int8(): products of 8-bit activations and weights, with a few columns in full precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

# Columns of the input that reach this are outliers (Dettmers et al. 2022, section 3.2).
THRESHOLD = 6.0


def mixed_product(
    x: Float[Array, "*rows i"],
    codes: Int8[Array, "i ..."],
    scales: Float[Array, "1 ..."],
    outliers: int,
) -> Float[Array, ...]:
    """`x (codes scales)`: each row of `x` is rounded to 8 bits too, and the product is in integers.

    Columns of `x` with a magnitude of `THRESHOLD` or more, the `outliers` largest of them, are
    multiplied as they are. The paper takes all such columns; a compiled program has a fixed number,
    so those beyond it are rounded as others are. The gradient of `x` is that of the product with
    the dense weight, as the paper's.

    Source: Dettmers et al. 2022, LLM.int8(), section 3.
    """

    @jax.custom_vjp
    def product(x: Any, codes: Any, scales: Any) -> Any:
        return _forward(x, codes, scales, min(outliers, codes.shape[0]))

    def forward(x: Any, codes: Any, scales: Any) -> Any:
        return product(x, codes, scales), (codes, scales)

    def backward(kept: Any, g: Any) -> Any:
        codes, scales = kept
        outputs = tuple(range(g.ndim - codes.ndim + 1, g.ndim))
        g = g * jnp.squeeze(scales, 0).astype(g.dtype)
        inner = tuple(range(1, codes.ndim))
        return (
            jax.lax.dot_general(g, codes.astype(g.dtype), ((outputs, inner), ((), ()))),
            None,
            None,
        )

    product.defvjp(forward, backward)
    return product(x, codes, scales)


def _forward(x: Any, codes: Any, scales: Any, outliers: int) -> Any:
    width = x.shape[-1]
    columns = jnp.abs(x).max(tuple(range(x.ndim - 1)), initial=0)
    largest, which = jax.lax.top_k(columns, outliers)
    whole = largest >= THRESHOLD
    kept = jnp.zeros(width, bool).at[which].set(whole)
    rest = jnp.where(kept, 0, x).astype(jnp.float32)
    row = jnp.abs(rest).max(-1, keepdims=True) / 127
    rounded = jnp.rint(rest / jnp.maximum(row, 1e-38)).astype(jnp.int8)
    along = (((x.ndim - 1,), (0,)), ((), ()))
    # 127 * 127 * i stays below 2^31 for any width of a model.
    y = jax.lax.dot_general(rounded, codes, along, preferred_element_type=jnp.int32)
    scales = jnp.squeeze(scales, 0)
    y = y.astype(jnp.float32) * row.reshape(*row.shape[:-1], *[1] * scales.ndim) * scales
    exact = jnp.where(whole, x[..., which], 0)
    weight = (codes[which] * scales).astype(x.dtype)
    return (y + jax.lax.dot_general(exact, weight, along).astype(jnp.float32)).astype(x.dtype)
