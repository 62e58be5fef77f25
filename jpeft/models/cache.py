"""Keys and values of the tokens that a decoder has read, kept between calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a decoder keeps of `b` rows with room for `s` tokens each.

    **Attributes:** `keys` and `values`, `(layers, b, s, kv_heads, width)`, as attention reads them
    (keys after their rotary embedding); `positions`, int32 `(b, s)`, each token's position, -1
    where there is padding or nothing yet; `length`, int32 scalar, the slots filled so far.
    """

    keys: Any
    values: Any
    positions: Any
    length: Any

    @property
    def room(self) -> int:
        """Slots in all."""
        return self.positions.shape[1]


def empty_cache(
    layers: int, batch: int, room: int, kv_heads: int, width: int, dtype: Any = jnp.float32
) -> Cache:
    """A cache with nothing in it."""
    shape = (layers, batch, room, kv_heads, width)
    return Cache(
        jnp.zeros(shape, dtype),
        jnp.zeros(shape, dtype),
        jnp.full((batch, room), -1, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def positions_of(
    attention_mask: Int[Array, "b t"],
    *,
    position_ids: Int[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    cache: Cache | None = None,
) -> Int[Array, "b t"]:
    """Each token's position, -1 at padding: as given, or counted from the cache's last or from each
    segment's start.

    **Raises:** `ValueError` for segments with a cache, or more tokens than the cache has room for.
    """
    t = attention_mask.shape[1]
    if cache is not None and segment_ids is not None:
        raise ValueError("a cache has no segments: give segment_ids or cache, not both")
    if cache is not None and t > cache.room:
        raise ValueError(f"the input has {t} tokens, the cache room for {cache.room}")
    if position_ids is not None:
        return jnp.where(attention_mask > 0, position_ids, -1).astype(jnp.int32)
    if cache is not None:
        start = jnp.max(cache.positions, axis=1, keepdims=True) + 1
        return token_positions(attention_mask, start)
    if segment_ids is None:
        return token_positions(attention_mask)
    mask = attention_mask.astype(jnp.int32)
    before = jnp.cumsum(mask, axis=1) - mask
    first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    start = jax.lax.cummax(jnp.where(first, before, 0), axis=1)
    return jnp.where(mask > 0, before - start, -1)


def token_positions(attention_mask: Int[Array, "b t"], start: Any = 0) -> Int[Array, "b t"]:
    """Positions that count the tokens that are no padding, from `start` on; -1 at padding."""
    mask = attention_mask.astype(jnp.int32)
    return jnp.where(mask > 0, jnp.cumsum(mask, axis=1) - 1 + start, -1)


def remember(
    stores: Any, layer: Any, slot: Any, key: Float[Array, "b t k w"], value: Float[Array, "b t k w"]
) -> tuple[Any, Float[Array, "b s k w"], Float[Array, "b s k w"]]:
    """All layers' stores with one layer's new keys and values from `slot` on, and what the layer
    reads: these two with all before them. Without stores (None) what it reads is the new ones.

    A loop over layers carries the stores whole, so that a step writes its tokens in place: stores
    taken apart by layer would be copied at every step.
    """
    if stores is None:
        return None, key, value
    stores = tuple(
        jax.lax.dynamic_update_slice(store, new[None].astype(store.dtype), (layer, 0, slot, 0, 0))
        for store, new in zip(stores, (key, value), strict=True)
    )
    key, value = (store[layer].astype(key.dtype) for store in stores)
    return stores, key, value


def write(store: Any, new: Any, at: Any, axis: int = 1) -> Any:
    """`new` put into `store` along `axis` from slot `at` on, in the store's type."""
    return jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), at, axis)
