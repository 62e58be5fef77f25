"""Small parts that several models share: activations, dropout, attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


def gelu(x: Float[Array, ...]) -> Float[Array, ...]:
    """`x Phi(x)` with the exact error function, as BERT has it."""
    # jax.nn.gelu goes through erfc, which costs more on a CPU and agrees to the last few bits.
    return 0.5 * x * (1 + jax.lax.erf(x * (1 / math.sqrt(2))))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def dropout(x: Float[Array, ...], rate: float, key: PRNGKeyArray | None) -> Float[Array, ...]:
    """Zero with probability `rate` and scale the rest, when a key is given; else `x`."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def attention(
    query_btd: Float[Array, "b t d"],
    key_bsd: Float[Array, "b s d"],
    value_bsd: Float[Array, "b s d"],
    keep_bs: Bool[Array, "b s"],
    *,
    heads: int,
    rate: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b t d"]:
    """Full attention among the positions that `keep_bs` marks, heads side by side in `d`.

    The softmax is in fp32. Dropout, when a key is given, is on the probabilities. A row with no
    position to attend to attends to all of them alike, and is not NaN.

    Source: Vaswani et al. 2017, equation 1.
    """
    b, t, d = query_btd.shape
    width = d // heads

    def split(x: Array) -> Array:
        return x.reshape(b, -1, heads, width)

    scores = jnp.einsum("bqhd,bkhd->bhqk", split(query_btd) * width**-0.5, split(key_bsd))
    # Finite, so that a row without any kept position has a softmax.
    bias = jnp.where(keep_bs[:, None, None, :], 0.0, -1e9)
    weights = jax.nn.softmax(scores.astype(jnp.float32) + bias, axis=-1).astype(value_bsd.dtype)
    weights = dropout(weights, rate, key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, split(value_bsd)).reshape(b, t, d)
