"""Small parts that several models share: activations and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Whether layers forget their activations, or a policy for what they keep.
Remat = bool | Callable[..., Any]


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


def rematerialised(step: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A layer's step whose activations are computed again in the backward pass, if `remat` says so.

    **Arguments:** `remat`, False, True, or one of `jax.checkpoint_policies` for what is kept.
    """
    if not remat:
        return step
    return jax.checkpoint(step, policy=remat if callable(remat) else None)


def last_tokens(x: Float[Array, "b t d"], mask: Int[Array, "#b t"]) -> Float[Array, "b 1 d"]:
    """What stands at each row's last token that is no padding."""
    at = jnp.max(jnp.where(mask > 0, jnp.arange(mask.shape[1]), 0), axis=1)
    at = jnp.broadcast_to(at, x.shape[:1])
    return jnp.take_along_axis(x, at[:, None, None], axis=1)
