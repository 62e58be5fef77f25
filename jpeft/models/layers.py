"""Small parts that several models share: activations and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


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
