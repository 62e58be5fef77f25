"""The dynamic map: 256 numbers from -1 or 0 to 1, fine near zero, that 8-bit codes stand for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# A cell is all fp32 numbers with the same upper half: sign, exponent and 7 bits of fraction.
_CELLS = 2**16


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic map, fp32, sorted; not to be written to.

    Seven decades up to 1, the i-th from the bottom (from 0) cut into 2^i equal parts (2^(i+1)
    where there is no sign), whose midpoints are values, with both signs if `signed`; and 0 and 1.

    Source: Dettmers 2015, section 2.1, and Dettmers et al. 2022, section 2.2, as bitsandbytes'
    `create_dynamic_map` has it, bit for bit.
    """
    values = [0.0, 1.0]
    first, last = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2 ** (i if signed else i + 1)
        # Edges as torch counts them, in fp32 from the nearer end, each rounded once.
        step = float((last - first) / np.float32(n))
        up, down = float(first) + step * np.arange(n + 1), 1 - step * np.arange(n, -1, -1)
        edges = np.where(np.arange(n + 1) < (n + 1) // 2, up, down).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles, *-middles] if signed else [*middles]
    out = np.sort(np.asarray(values, np.float32))
    out.flags.writeable = False
    return out


def encode(x: Float[Array, "*shape"], map: np.ndarray) -> UInt8[Array, "*shape"]:
    """The index of the nearest value of a sorted `map`; of two as near, the lower.

    What is not a number is coded as the largest.

    **Arguments:** `map`, 2 to 256 numbers, sorted.

    **Raises:** `ValueError` for another map.
    """
    borders, cells = _borders(np.asarray(map, np.float32).tobytes())
    x = x.astype(jnp.float32)
    if cells is None:
        return _counted(x, borders)
    # TPUs compare with every border faster than they look one up.
    return jax.lax.platform_dependent(
        x,
        tpu=lambda x: _counted(x, borders),
        default=lambda x: _looked_up(x, borders, cells),
    )


def decode(codes: UInt8[Array, "*shape"], map: np.ndarray) -> Float[Array, "*shape"]:
    """The values, fp32, that codes stand for.

    **Arguments:** `map`, up to 256 numbers; codes must be below their number.
    """
    values = np.asarray(map, np.float32)

    def chosen(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        # One value and zeros: the sum is exact. The compiler fuses it, nothing is 256 times as big.
        each = _leading(np.arange(len(values), dtype=np.uint8), codes.ndim)
        return jnp.sum(jnp.where(codes == each, _leading(values, codes.ndim), 0), axis=0)

    def looked_up(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.asarray(values).at[codes].get(mode="promise_in_bounds")

    return jax.lax.platform_dependent(codes, tpu=chosen, default=looked_up)


def _counted(x: Float[Array, "*shape"], borders: np.ndarray) -> UInt8[Array, "*shape"]:
    """How many borders are below each number."""
    # Not below or at it, so that what is no number is above all of them.
    above = ~(x <= _leading(borders, x.ndim))
    return jnp.sum(above, axis=0, dtype=jnp.int32).astype(jnp.uint8)


def _looked_up(
    x: Float[Array, "*shape"], borders: np.ndarray, cells: np.ndarray
) -> UInt8[Array, "*shape"]:
    """How many borders are below each number, from its cell, which has one border at most."""
    cell = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    low = jnp.asarray(cells).at[cell].get(mode="promise_in_bounds")
    border = jnp.asarray(np.append(borders, np.float32(np.inf)))
    above = x > border.at[low].get(mode="promise_in_bounds")
    return low + above.astype(jnp.uint8)


@functools.lru_cache(maxsize=16)
def _borders(map: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """The midpoints of a map's values, and how many of them are below every number of each cell.

    None in place of the second where a cell holds more than one midpoint.
    """
    values = np.frombuffer(map, np.float32)
    if not 2 <= len(values) <= 256 or not np.all(values[:-1] <= values[1:]):
        raise ValueError(f"a map is 2 to 256 sorted numbers, got {len(values)}: {values}")
    borders = (values[:-1] + values[1:]) / 2
    first = np.arange(_CELLS, dtype=np.uint32) << 16
    ends = np.stack([first, first | 0xFFFF]).view(np.float32)
    # `sort` puts what is not a number last, as `_counted` does.
    below = np.sort(np.searchsorted(borders, ends), axis=0)
    if np.any((below[1] - below[0])[np.isfinite(ends[0])] > 1):
        return borders, None
    return borders, below[0].astype(np.uint8)


def _leading(values: np.ndarray, ndim: int) -> jax.Array:
    """Values along a new first axis of what has `ndim` others."""
    return jnp.asarray(values).reshape(-1, *[1] * ndim)
