"""Keys and values of the tokens that a decoder has read, kept between calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


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


def token_positions(attention_mask: Int[Array, "b t"], start: Any = 0) -> Int[Array, "b t"]:
    """Positions that count the tokens that are no padding, from `start` on; -1 at padding."""
    mask = attention_mask.astype(jnp.int32)
    return jnp.where(mask > 0, jnp.cumsum(mask, axis=1) - 1 + start, -1)


def write(store: Any, new: Any, at: Any, axis: int = 1) -> Any:
    """`new` put into `store` along `axis` from slot `at` on, in the store's type."""
    return jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), at, axis)
