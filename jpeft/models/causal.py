"""Attention of decoders: who may read whom, grouped heads, soft caps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def may_read(
    query_positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    *,
    window: Any = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
) -> Bool[Array, "b t s"]:
    """Which keys each query reads: those at its own and earlier positions, within its segment.

    **Arguments:** positions are -1 at padding, which nobody reads; `window`, None or how many
    positions back are read, the query's own among them (a number, or an int32 scalar).
    """
    back = query_positions[:, :, None] - key_positions[:, None, :]
    keep = (back >= 0) & (key_positions >= 0)[:, None, :]
    if window is not None:
        keep &= back < window
    if query_segments is not None and key_segments is not None:
        keep &= query_segments[:, :, None] == key_segments[:, None, :]
    return keep


def causal_attention(
    query: Float[Array, "b t h w"],
    key: Float[Array, "b s k w"],
    value: Float[Array, "b s k w"],
    keep: Bool[Array, "b t s"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "b t h w"]:
    """Attention with grouped heads, `h` a multiple of `k`; scores are in fp32.

    Goes through `jax.nn.dot_product_attention` (cuDNN on GPUs), except with `softcap`, where scores
    become `softcap * tanh(scores / softcap)` (Gemma 2). A query that reads nothing, which is
    padding, gets the mean of all values, and is not NaN.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(query, key, value, mask=keep[:, None], scale=scale)
    groups = query.shape[2] // key.shape[2]
    b, t, _, w = query.shape
    grouped = query.reshape(b, t, key.shape[2], groups, w)
    scores = jnp.einsum("btkgw,bskw->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (scale / softcap))
    scores = jnp.where(keep[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskw->btkgw", weights, value).reshape(query.shape)
