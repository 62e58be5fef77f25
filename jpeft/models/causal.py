"""Attention of decoders: who may read whom, grouped heads, soft caps, biases."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jpeft.models.layers import dropout

Implementation = Literal["xla", "cudnn"] | None


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
    keep: Bool[Array, "#b #t s"] | None,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "#b h t s"] | None = None,
    rate: float = 0.0,
    rng: PRNGKeyArray | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b t h w"]:
    """Attention with grouped heads, `h` a multiple of `k`; scores are in fp32.

    **Arguments:**

    - `keep`, which keys each query reads, as `may_read` has it; None where every query reads all
      keys up to its own, of which cuDNN works out half.
    - `softcap`, scores become `softcap * tanh(scores / softcap)` (Gemma 2).
    - `bias`, added to the scaled scores.
    - `rate`, of dropout on the probabilities, when `rng` is given.
    - `implementation`, that of `jax.nn.dot_product_attention`: `cudnn` is flash attention on NVIDIA
      GPUs, in bf16 or fp16, with neither soft caps nor dropout; a single query is XLA's always.

    A query that reads nothing, which is padding, gets the mean of all values, and is not NaN.

    **Raises:** `ValueError` for cuDNN with a soft cap or dropout.
    """
    dropping = rng is not None and rate > 0
    if softcap is None and not dropping:
        mask = None
        if keep is not None:
            mask = jnp.broadcast_to(keep, (keep.shape[0], query.shape[1], key.shape[1]))[:, None]
        if query.shape[1] == 1:
            implementation = None
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask,
            scale=scale, is_causal=keep is None, implementation=implementation,
        )  # fmt: skip
    if implementation == "cudnn":
        raise ValueError("cuDNN's attention has neither soft caps nor dropout here: leave it out")
    b, t, h, w = query.shape
    if keep is None:
        keep = jnp.tri(t, key.shape[1], dtype=bool)[None]
    groups = h // key.shape[2]
    grouped = query.reshape(b, t, key.shape[2], groups, w)
    scores = jnp.einsum("btkgw,bskw->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, h, t, -1) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(keep[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, rng).astype(value.dtype)
    weights = weights.reshape(b, key.shape[2], groups, t, -1)
    return jnp.einsum("bkgts,bskw->btkgw", weights, value).reshape(query.shape)
