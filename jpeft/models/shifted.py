"""Shifted sparse attention: causal attention within groups, half of the heads half a group on."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft.models.causal import causal_attention, may_read


def shifted_attention(
    query: Float[Array, "b t h w"],
    key: Float[Array, "b t k w"],
    value: Float[Array, "b t k w"],
    positions: Int[Array, "b t"],
    *,
    group: int,
    scale: float,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h w"]:
    """Attention among each `group` of tokens, at a cost that grows linearly with `t`.

    The second half of the heads is rolled back by half a group, so that its groups join the first
    half's. What the roll takes from the start of the row to its end, tokens and row's end do not
    read each other: no output depends on a later token, which a plain causal mask after the roll
    does not hold.

    **Arguments:** queries and keys as they are after their rotary embedding; `positions`, -1 at
    padding; `segments`, as `may_read`'s.

    **Raises:** `ValueError` for rows that do not split into groups of an even size, or an odd
    number of heads.

    Source: Chen et al. 2024 (LongLoRA), section 3.2, for training only.
    """
    t, h = query.shape[1:3]
    if group < 2 or group % 2 or t % group:
        raise ValueError(
            f"shifted attention needs rows that split into groups of an even size: {t} tokens, "
            f"groups of {group}"
        )
    if h % 2:
        raise ValueError(f"shifted attention splits the heads in two halves, but there are {h}")
    if key.shape[2] % 2:
        key, value = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (key, value))
    keep = _keep(positions, segments, jnp.zeros_like(positions), group)
    # After the roll the last half group is the row's first tokens: a text of their own.
    wrapped = jnp.broadcast_to(jnp.arange(t) >= t - group // 2, positions.shape).astype(jnp.int32)
    rolled = jnp.roll(positions, -group // 2, axis=1)
    moved = None if segments is None else jnp.roll(segments, -group // 2, axis=1)
    keep_rolled = _keep(rolled, moved, wrapped, group)
    halves = [jnp.split(x, 2, axis=2) for x in (query, key, value)]
    first = _grouped(*(x for x, _ in halves), keep, group, scale)
    back = (jnp.roll(x, -group // 2, axis=1) for _, x in halves)
    second = jnp.roll(_grouped(*back, keep_rolled, group, scale), group // 2, axis=1)
    return jnp.concatenate([first, second], axis=2)


def _keep(positions: Array, segments: Array | None, wrapped: Array, group: int) -> Array:
    """Who reads whom within each group: `(b * t / group, group, group)`."""
    positions, wrapped = positions.reshape(-1, group), wrapped.reshape(-1, group)
    keep = may_read(positions, positions, query_segments=wrapped, key_segments=wrapped)
    if segments is not None:
        segments = segments.reshape(-1, group)
        keep &= segments[:, :, None] == segments[:, None, :]
    return keep


def _grouped(
    query: Array, key: Array, value: Array, keep: Array, group: int, scale: float
) -> Array:
    parts = [x.reshape(-1, group, *x.shape[2:]) for x in (q, k, v)]
    return causal_attention(*parts, keep, scale=scale).reshape(q.shape)
