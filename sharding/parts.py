"""A batch in equal parts, which a step takes one after another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sharding.zero import Zero, batch_string


def in_parts(batch: Any, accumulate: int, zero: Zero | None) -> Any:
    """Every array as `(accumulate, rows, ...)`, a scalar as `(accumulate,)`.

    Every part has rows of every device, which stay there.

    **Raises:** `ValueError` for rows that do not divide over parts and devices.
    """

    def of(path: Any, x: Any) -> Any:
        if not x.ndim:
            return jnp.broadcast_to(x, (accumulate,))
        if x.shape[0] % accumulate:
            raise ValueError(
                f"{batch_string(path)} has {x.shape[0]} rows, which cannot be taken in "
                f"{accumulate} equal parts"
            )
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1)

    parts = jax.tree_util.tree_map_with_path(of, batch)
    if zero is None:
        return parts

    def placed(x: Any, rows: NamedSharding) -> Any:
        where = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))
        return jax.lax.with_sharding_constraint(x, where)

    return jax.tree.map(placed, parts, zero.batch(batch, accumulate))
