"""Looking up rows of a table: what a `gather` must be to be one, and where its results lie."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jpeft.leaf import Call


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a table `(rows, width)` by number.

    **Attributes:** `component`, the place of the row's number in an index vector; `width`, the
    axis of the result that holds the row; `extra`, None, or an axis of size 1 beside it.
    """

    component: int
    width: int
    extra: int | None

    def numbers(self, call: Call) -> Array:
        """The rows' numbers, of the shape of the look-ups."""
        return call.operands[1][..., self.component]

    def arrange(self, values: Array) -> Array:
        """Values `(*look-ups, n)` as the result has its rows, with `n` in place of the width."""
        if self.extra is None:
            return jnp.moveaxis(values, -1, self.width)
        pair = values[..., None, :] if self.extra < self.width else values[..., None]
        return jnp.moveaxis(pair, (-2, -1), sorted((self.extra, self.width)))


def lookup(call: Call, index: int, rows: int = 0) -> Lookup | None:
    """The look-up that a `gather` from operand `index` is, or None where it is something else.

    **Arguments:** `rows`, which of the table's two axes counts rows.
    """
    if index != 0 or len(call.params["slice_sizes"]) != 2:
        return None
    d, sizes, shape = call.params["dimension_numbers"], call.params["slice_sizes"], call.operands[0]
    width = 1 - rows
    if (
        d.operand_batching_dims
        or rows not in d.start_index_map
        or sizes[rows] != 1
        or sizes[width] != shape.shape[width]
        or width in d.collapsed_slice_dims
    ):
        return None
    component = d.start_index_map.index(rows)
    if rows in d.collapsed_slice_dims:
        return Lookup(component, d.offset_dims[0], None)
    return Lookup(component, d.offset_dims[width], d.offset_dims[rows])
