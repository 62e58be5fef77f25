"""Parameters from a directory of safetensors, and back, by the table of `names`.

Tensors stream one at a time: each is read, cast, and put into its place on the device (for stacked
layers into its layer), so that the host holds one of them beside the model.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jpeft._disk import listed
from jpeft.hf.files import CheckpointError, Lazy, Tensors
from jpeft.hf.names import Family, Place, normal_name, places
from jpeft.paths import flatten, replace

# safetensors' names of the types that weights may have.
REAL = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: paths that are `new` (initialised), tensors that were `ignored`."""

    new: tuple[str, ...]
    ignored: tuple[str, ...]


def load_params(
    directory: pathlib.Path,
    like: Any,
    family: Family,
    *,
    fresh: Callable[[], Any] | None = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
) -> tuple[Any, LoadReport]:
    """A tree like `like`, of the tensors in a directory.

    **Arguments:** `like`, a tree of `jax.ShapeDtypeStruct`: the types that tensors are cast to;
    `fresh`, makes the whole tree at its start, called where the file lacks a parameter that the
    family allows to be new; `sharding`, a parameter's, from its path and shape: every tensor goes
    straight to the devices that hold it.

    **Raises:** `CheckpointError` with every missing, unexpected, misshapen and mistyped tensor.
    """
    tensors = Tensors(directory)
    want = flatten(like)
    table = places(family, want)
    plan = _plan(tensors, want, table, family)
    if plan.problems:
        raise CheckpointError(listed(f"{directory} does not hold this model", plan.problems))
    initial: dict[str, Any] = flatten(fresh()) if plan.new and fresh is not None else {}
    values: dict[str, Any] = {}
    for path, leaf in want.items():
        where = None if sharding is None else sharding(path, leaf)
        if path in plan.new:
            values[path] = initial[path].astype(leaf.dtype)
            if where is not None:
                values[path] = jax.device_put(values[path], where)
        else:
            values[path] = _read(tensors, plan.sources[path], table[path], leaf, where)
    return replace(like, values), LoadReport(tuple(sorted(plan.new)), tuple(plan.ignored))


def lazy_tensors(params: Any, family: Family) -> dict[str, Lazy]:
    """Every tensor of the file that `params` make, by name, read when its turn comes."""
    out: dict[str, Lazy] = {}
    leaves = flatten(params)
    for path, spot in places(family, leaves).items():
        array = leaves[path]
        size = array.size * array.dtype.itemsize
        if not spot.stacked:
            out[spot.name] = Lazy(size, functools.partial(_host, array, None, spot.transposed))
            continue
        for i in range(array.shape[0]):
            read = functools.partial(_host, array, i, spot.transposed)
            out[spot.of_layer(i)] = Lazy(size // array.shape[0], read)
    return out


@dataclasses.dataclass
class _Plan:
    """Which tensors make each parameter (in order of layers), and what is wrong."""

    sources: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    new: set[str] = dataclasses.field(default_factory=set)
    ignored: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def _plan(
    tensors: Tensors, want: Mapping[str, Any], table: Mapping[str, Place], family: Family
) -> _Plan:
    plan = _Plan()
    found = {normal_name(family, name): name for name in tensors.names()}
    used: set[str] = set()
    for path, leaf in want.items():
        spot = table[path]
        names = [spot.of_layer(i) for i in range(leaf.shape[0])] if spot.stacked else [spot.name]
        sources = [
            _find(found, name, family.prefix) or found.get(family.shared.get(name, ""))
            for name in names
        ]
        if not any(sources) and re.search(family.new, path):
            plan.new.add(path)
            continue
        shape = tuple(leaf.shape[1:] if spot.stacked else leaf.shape)
        shape = shape[::-1] if spot.transposed else shape
        for name, source in zip(names, sources, strict=True):
            if source is None:
                plan.problems.append(f"missing: {name}")
                continue
            used.add(source)
            if tensors.shape(source) != shape:
                if re.search(family.replaced, path):
                    plan.new.add(path)
                    plan.ignored.append(source)
                else:
                    plan.problems.append(
                        f"misshapen: {source} is {tensors.shape(source)}, not {shape}"
                    )
            elif tensors.kind(source) not in REAL:
                plan.problems.append(
                    f"mistyped: {source} is {tensors.kind(source)}, not one of {', '.join(REAL)}"
                )
        plan.sources[path] = [s for s in sources if s is not None]
    for name, source in found.items():
        if source in used:
            continue
        if re.search(family.ignored, name):
            plan.ignored.append(source)
        else:
            plan.problems.append(f"unexpected: {source}")
    return plan


def _find(found: Mapping[str, str], name: str, prefix: str) -> str | None:
    for spelling in (name, prefix + name, name.removeprefix(prefix)):
        if spelling in found:
            return found[spelling]
    return None


def _read(tensors: Tensors, sources: list[str], spot: Place, leaf: Any, where: Any) -> jax.Array:
    def one(source: str) -> np.ndarray:
        value = tensors.read(source)
        value = value.T if spot.transposed else value
        # Cast here: a wider file never stands on the device.
        return value.astype(leaf.dtype, copy=False)

    if not spot.stacked:
        return jax.device_put(one(sources[0]), where)
    if where is None:
        each: Any = None
    elif isinstance(where, NamedSharding) and (not where.spec or where.spec[0] is None):
        each = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    else:  # layers on different devices: each device's part is put together on the host

        def part(index: Any) -> np.ndarray:
            return np.stack([one(s)[index[1:]] for s in sources[index[0]]])

        return jax.make_array_from_callback(tuple(leaf.shape), where, part)
    stacked = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=where)()
    put = jax.jit(_put, donate_argnums=0, out_shardings=where)
    for i, source in enumerate(sources):
        # Waited for, or the next tensor is read while the host still holds this one.
        stacked = put(stacked, jax.device_put(one(source), each), i).block_until_ready()
    return stacked


def _put(stacked: Any, layer: Any, i: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)


def _host(array: Any, layer: int | None, transposed: bool) -> np.ndarray:
    value = np.asarray(array if layer is None else array[layer])
    return value.T if transposed else value
