"""Parameters from a directory of safetensors, and back, by the table of `names`.

Tensors stream one at a time: each is read, cast, and put into its place on the device (for stacked
layers into its layer), so that the host holds one of them beside the model. A weight that is to be
quantised is so there, layer by layer: the dense model is nowhere.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from jpeft._disk import listed
from jpeft.hf import bitsandbytes, quantized_files
from jpeft.hf.bitsandbytes import Packed
from jpeft.hf.files import CheckpointError, Lazy, Tensors
from jpeft.hf.names import Family, Place, places
from jpeft.hf.plan import Plan, plan_of
from jpeft.hf.stacking import Form, filled, form, moved, splits_layers, without_first
from jpeft.paths import TargetError, flatten, replace
from jpeft.quantize import Quantize
from jpeft.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: paths that are `new` (initialised), tensors that were `ignored`."""

    new: tuple[str, ...]
    ignored: tuple[str, ...]


# Bytes of layers that are stacked on the host, in one piece; larger ones go to the devices one by
# one, by a program that is compiled for their shape.
WHOLE = 64 * 2**20


def load_params(
    directory: pathlib.Path,
    like: Any,
    family: Family,
    *,
    fresh: Callable[[], Any] | None = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
    quantize: Quantize | None = None,
) -> tuple[Any, LoadReport]:
    """A tree like `like`, of the tensors in a directory.

    Weights that the directory has in 4 bits (bitsandbytes', or `save_quantized`'s) come as
    `jpeft.Quantized` leaves.

    **Arguments:** `like`, a tree of `jax.ShapeDtypeStruct`: the types that tensors are cast to;
    `fresh`, makes the whole tree at its start, called where the file lacks a parameter that the
    family allows to be new; `sharding`, a parameter's, from its path and shape: every tensor goes
    straight to the devices that hold it; `quantize`, which weights become `jpeft.Quantized` leaves
    while they are read, and how.

    **Raises:** `CheckpointError` with every missing, unexpected, misshapen and mistyped tensor;
    `TargetError` for what `quantize` cannot act on; `ValueError` for a quantised weight's sharding
    that splits blocks or layers.
    """
    want = flatten(like)
    table = places(family, want)
    tensors = Tensors(directory)
    saved = quantized_files.saved_as(directory)
    packed = {} if saved is not None else bitsandbytes.find(tensors)
    if quantize is not None and (saved is not None or packed):
        raise TargetError(
            f"{directory} has weights that are quantised already: load it without quantize="
        )
    if saved is not None:
        found = quantized_files.load_leaves(tensors, saved, want, table, family, sharding)
        values = found.values | _new(found.new, want, fresh, sharding, {})
        return replace(like, values), LoadReport(tuple(sorted(found.new)), found.ignored)
    plan = plan_of(tensors, want, table, family, packed)
    if plan.problems:
        raise CheckpointError(listed(f"{directory} does not hold this model", plan.problems))
    forms = _forms(want, table, plan, packed, quantize, sharding)
    values = _new(plan.new, want, fresh, sharding, forms)
    _tell(directory, want, plan, packed, forms)
    for path, leaf in want.items():
        if path in plan.new:
            continue
        source = _Source(tensors, plan.sources[path], table[path], leaf.dtype, packed)
        if path in forms:
            values[path] = _read_quantised(source, forms[path][1], forms[path][0], path)
        else:
            values[path] = _read(source, leaf, None if sharding is None else sharding(path, leaf))
    return replace(like, values), LoadReport(tuple(sorted(plan.new)), tuple(plan.ignored))


def lazy_tensors(params: Any, family: Family) -> dict[str, Lazy]:
    """Every tensor of the file that `params` make, by name, read when its turn comes. A quantised
    weight is made dense then, one layer at a time.
    """
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


@dataclasses.dataclass(frozen=True)
class _Source:
    """The tensors of one parameter, in order of layers, and the type that they are cast to."""

    tensors: Tensors
    names: list[str]
    spot: Place
    dtype: Any
    packed: Mapping[str, Packed]

    def host(self, i: int) -> np.ndarray:
        """One of them as the parameter has it."""
        value = self.tensors.read(self.names[i])
        value = value.T if self.spot.transposed else value
        # Cast here: a wider file never stands on the device.
        return value.astype(self.dtype, copy=False)

    def dense(self, i: int) -> Any:
        """As `host`; what bitsandbytes quantised is made dense, on the device."""
        packed = self.packed.get(self.names[i])
        if packed is None:
            return self.host(i)
        return bitsandbytes.read_dense(self.tensors, packed, self.dtype)


def _forms(
    want: Mapping[str, Any],
    table: Mapping[str, Place],
    plan: Plan,
    packed: Mapping[str, Packed],
    quantize: Quantize | None,
    sharding: Callable[[str, Any], Any] | None,
) -> dict[str, tuple[Quantize, Form]]:
    """Path to how it is quantised, for every quantised parameter."""
    found: dict[str, Quantize] = {}
    if quantize is not None:
        found = dict.fromkeys(quantize.chosen(want), quantize)
    for path, names in plan.sources.items():
        each = [packed.get(name) for name in names]
        if path not in plan.new and each[0] is not None and bitsandbytes.alike(each):
            found[path] = each[0].quantize
    out: dict[str, tuple[Quantize, Form]] = {}
    for path, by in found.items():
        where = None if sharding is None else sharding(path, want[path])
        out[path] = by, form(by, path, want[path], table[path].stacked, where)
    return out


def _tell(
    directory: pathlib.Path,
    want: Mapping[str, Any],
    plan: Plan,
    packed: Mapping[str, Packed],
    forms: Mapping[str, Any],
) -> None:
    """Once, the weights that bitsandbytes quantised and that are not kept so."""
    wide = {
        path: [packed[n] for n in names if n in packed]
        for path, names in plan.sources.items()
        if path not in forms
    }
    wide = {path: each for path, each in wide.items() if each}
    if wide:
        dtype = want[next(iter(wide))].dtype
        bitsandbytes.tell_dense(directory, [p for each in wide.values() for p in each], dtype)


def _new(
    new: Collection[str],
    want: Mapping[str, Any],
    fresh: Callable[[], Any] | None,
    sharding: Callable[[str, Any], Any] | None,
    forms: Mapping[str, tuple[Quantize, Form]],
) -> dict[str, Any]:
    """What the file lacks, at its start."""
    if not new or fresh is None:
        return {}

    def start() -> dict[str, Any]:
        initial = flatten(fresh())
        return {path: initial[path].astype(want[path].dtype) for path in sorted(new)}

    # In one program: what is not asked for is not computed.
    initial = jax.jit(start)()
    for path, value in initial.items():
        if path in forms:
            by, made = forms[path]
            leaf = by.array(path, value, int(made.count is not None), -2)
            initial[path] = moved(leaf, made.where)
        elif sharding is not None:
            initial[path] = jax.device_put(value, sharding(path, want[path]))
    return initial


def _read_quantised(source: _Source, made: Form, by: Quantize, path: str) -> Quantized:
    def one(i: int) -> Quantized:
        packed = source.packed.get(source.names[i])
        if packed is not None:
            return bitsandbytes.read(source.tensors, packed, made.layer)
        # On one device, whatever the sharding: the same bits everywhere.
        return by.array(path, jax.device_put(source.host(i)), 0, -2)

    return made.build(one)


def _read(source: _Source, leaf: Any, where: Any) -> jax.Array:
    if not source.spot.stacked:
        return jax.device_put(source.dense(0), where)
    if splits_layers(where):  # each device's part is put together on the host

        def part(index: Any) -> np.ndarray:
            layers = range(*index[0].indices(len(source.names)))
            return np.stack([np.asarray(source.dense(i))[index[1:]] for i in layers])

        return jax.make_array_from_callback(tuple(leaf.shape), where, part)
    if np.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize <= WHOLE:
        whole = np.stack([np.asarray(source.dense(i)) for i in range(len(source.names))])
        return jax.device_put(whole, where)
    each = without_first(where)
    return filled(lambda i: jax.device_put(source.dense(i), each), len(source.names), where)


def _host(array: Any, layer: int | None, transposed: bool) -> np.ndarray:
    if isinstance(array, Quantized):
        one = array if layer is None else jax.tree.map(lambda x: x[layer], array)
        value = np.asarray(one.materialise())
    else:
        value = np.asarray(array if layer is None else array[layer])
    return value.T if transposed else value
