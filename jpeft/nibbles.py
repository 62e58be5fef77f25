"""4-bit numbers: their code tables, and two of them in a byte.

Both tables are those of Dettmers et al. 2023 (QLoRA) and of bitsandbytes, entry by entry: a code
means the same number there and here. Only the order of the nibbles differs: a byte holds the codes
`j` and `j + block / 2` of one block, so that a block is unpacked by joining two halves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# The quantiles of a standard normal, scaled to [-1, 1], with a zero of its own (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent, one of fraction; the largest, 12, is scaled to 1.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(np.float32(s * x) / np.float32(12) for s in (1, -1) for x in _FP4)
TABLES = {"nf4": NF4, "fp4": FP4}


def nearest(x: Float[Array, "*shape"], table: str) -> UInt8[Array, "*shape"]:
    """The code of the table's entry nearest to each number in [-1, 1]; of two, the lower one."""
    values = np.asarray(TABLES[table], np.float32)
    order = np.argsort(values, kind="stable").astype(np.uint8)
    values = values[order]
    bounds = (values[:-1] + values[1:]) / np.float32(2)
    place = jnp.zeros(x.shape, jnp.uint8)
    for b in bounds:
        place += x > b
    return place if (order == range(16)).all() else jnp.asarray(order)[place]


def values(codes: UInt8[Array, "*shape"], table: str) -> Float[Array, "*shape"]:
    """The numbers that codes stand for, in fp32."""
    entries = np.asarray(TABLES[table], np.float32)

    def gathered(codes: Any) -> Any:
        return jnp.asarray(entries).at[codes].get(mode="promise_in_bounds")

    def chosen(codes: Any) -> Any:
        # Between halves of the table, four times: a TPU has no gather of single numbers. Elsewhere
        # the compiler would make the broadcast entries in full size, outside a loop over layers.
        halves = [jnp.float32(x) for x in entries]
        for bit in range(4):
            on = (codes >> bit) & 1 == 1
            pairs = zip(halves[::2], halves[1::2], strict=True)
            halves = [jnp.where(on, high, low) for low, high in pairs]
        return halves[0]

    return jax.lax.platform_dependent(codes, tpu=chosen, default=gathered)


def pack(codes: UInt8[Array, "*shape"], axis: int) -> UInt8[Array, "*packed"]:
    """One block along `axis`, of an even number of codes, in half as many bytes."""
    first, second = jnp.split(codes, 2, axis)
    return first << 4 | second


def unpack(packed: UInt8[Array, "*packed"], axis: int) -> UInt8[Array, "*shape"]:
    """The codes of one block along `axis`."""
    return jnp.concatenate([packed >> 4, packed & 15], axis)
