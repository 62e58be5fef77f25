"""Normalisation whose derivative needs one array of the input's size, not one for every step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def normalised(x: Float[Array, "*b d"], eps: float, centred: bool) -> Float[Array, "*b d"]:
    """`(x - mean) / sqrt(var + eps)` along the last axis, or `x / sqrt(mean(x^2) + eps)`; in fp32.

    For the backward pass only the result is kept, in `x`'s type, and one number for each row.

    **Arguments:** `centred`, whether the mean is taken off.

    Source: Ba et al. 2016, equation 3; Zhang and Sennrich 2019, equation 4.
    """
    return _normalised(x, eps, centred)[0]


def _normalised(x: Any, eps: float, centred: bool) -> tuple[Any, Any]:
    x = x.astype(jnp.float32)
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale, scale


@normalised.defjvp
def _derivative(eps: float, centred: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (t,) = primals, tangents
    y, scale = _normalised(x, eps, centred)
    kept, t = y.astype(x.dtype).astype(jnp.float32), t.astype(jnp.float32)
    if centred:
        t = t - jnp.mean(t, axis=-1, keepdims=True)
    return y, scale * (t - kept * jnp.mean(kept * t, axis=-1, keepdims=True))


class LayerNorm(nnx.Module):
    """`normalised(x) * scale + bias`, in fp32; the result in `dtype`."""

    def __init__(self, width: int, eps: float, dtype: Any, param_dtype: Any) -> None:
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """`x`, normalised along its last axis."""
        row = (1,) * (x.ndim - 1) + (-1,)
        y = normalised(x, self.eps, True) * self.scale[...].reshape(row)
        return (y + self.bias[...].reshape(row)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """`normalised(x) * scale` without a mean, in fp32; the result in `dtype`.

    **Arguments:** `around_one`, whether what is learned is the scale less 1, as Gemma has it.
    """

    def __init__(
        self, width: int, eps: float, dtype: Any, param_dtype: Any, around_one: bool = False
    ) -> None:
        self.eps, self.dtype, self.around_one = eps, dtype, around_one
        fill = jnp.zeros if around_one else jnp.ones
        self.scale = nnx.Param(fill((width,), param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """`x`, normalised along its last axis."""
        scale = self.scale[...].astype(jnp.float32)
        x = normalised(x, self.eps, False)
        return (x * (1 + scale if self.around_one else scale)).astype(self.dtype)
