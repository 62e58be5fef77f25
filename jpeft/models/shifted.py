"""Shifted sparse attention, for training on long texts (LongLoRA)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpeft.models.causal import Implementation, causal_attention, may_read


def shifted_attention(
    query: Float[Array, "b t h w"],
    key: Float[Array, "b t k w"],
    value: Float[Array, "b t k w"],
    positions: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None = None,
    *,
    group: int,
    window: int | Int[Array, ""] | None = None,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "b t h w"]:
    """Causal attention within groups of `group` tokens, by half of a group later in half the heads.

    Its cost grows with `t * group`. Where the second half's groups wrap around, the row's start and
    end do not read each other. `positions`, `segments` and `window` are `may_read`'s.

    **Raises:** `ValueError` where rows do not split into groups, or groups or heads into halves.

    Source: Chen et al. 2024, section 3.2.
    """
    b, t, h, w = query.shape
    if t % group or group % 2:
        raise ValueError(f"rows of {t} tokens do not split into groups of {group}, an even number")
    if h % 2:
        raise ValueError(f"shifted attention halves the heads: got {h}")
    if key.shape[2] % 2:
        key, value = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (key, value))
    segments = jnp.zeros_like(positions) if segments is None else segments
    # The tokens that come round to the row's end are a text of their own there.
    start = jnp.arange(t) < group // 2
    halves: list[Array] = []
    for half, shift in enumerate((0, group // 2)):

        def grouped(x: Array, shift: int = shift) -> Array:
            x = jnp.roll(x, -shift, axis=1) if shift else x
            return x.reshape(b * (t // group), group, *x.shape[2:])

        own = grouped(2 * segments + (start if shift else 0))
        at = grouped(positions)
        keep = may_read(at, at, window=window, query_segments=own, key_segments=own)
        q, k, v = (grouped(jnp.split(x, 2, axis=2)[half]) for x in (query, key, value))
        out = causal_attention(
            q, k, v, keep, scale=scale, softcap=softcap, implementation=implementation
        )
        halves.append(jnp.roll(out.reshape(b, t, h // 2, w), shift, axis=1))
    return jnp.concatenate(halves, axis=2)
