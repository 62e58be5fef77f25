"""What arrays hold, to the bit, in a number: to name a tree, and to know damage when it is read."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(tree: Any) -> str:
    """A short name of a tree's exact contents: paths, shapes, types, and sums of their bits.

    Sums of integers do not depend on how arrays are sharded. It reads every array once.
    """
    found = named(tree)
    sums = bit_sums(found)
    digest = hashlib.sha256()
    for name, x in sorted(found.items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} {sums[name]}\n".encode())
    return digest.hexdigest()[:16]


def bit_sums(arrays: dict[str, Any]) -> dict[str, int]:
    """A number of each array's bits, the same on any devices: another one if one element changes.

    Every process must ask for the same arrays. Those in the host's memory are on the device one
    after another.
    """

    def of(x: Any) -> Any:
        return int(_bit_sum(x)) if is_hosted(x) else _bit_sum(x)

    sums = {name: of(plain(x)) for name, x in arrays.items()}
    return {name: int(x) for name, x in sums.items()}  # after all of them were started


@jax.jit
def _bit_sum(x: Any) -> Any:
    """The sum of an array's bits, read as whole numbers and mixed with their places, modulo 2^32.

    Mixing is one to one: no change of one number is lost, and two that change places are seen.
    """
    x = jax.device_put(x, jax.memory.Space.Device) if is_hosted(x) else x
    x = _whole_numbers(x)
    place = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size % 2**32) + along
    return jnp.sum(_mixed(x.astype(jnp.uint32) ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: Any) -> Any:
    """Every bit of a number spread over all of them (the last step of MurmurHash3, Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _whole_numbers(x: Any) -> Any:
    """An array's bits as whole numbers of at most 32 bits, along one more axis where it needs."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.bool_):
        return x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def named(tree: Any) -> dict[str, Any]:
    """Arrays by path. **Raises:** `ValueError` for two of the same path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    out = {jax.tree_util.keystr(p, simple=True, separator="/") or "array": x for p, x in flat}
    if len(out) != len(flat):
        raise ValueError("two arrays of the state have the same path")
    return out


def is_key(x: Any) -> bool:
    """Whether these are PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_hosted(x: Any) -> bool:
    """Whether programs take an array from the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def plain(x: Any) -> Any:
    """An array that can be written: of keys, what is in them."""
    return jax.random.key_data(x) if is_key(x) else x
