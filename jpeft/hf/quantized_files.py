"""Directories of quantised weights in our own layout: our names, codes and scales as they are.

`config.json` has `{"quant_method": "jpeft", "version": 1, "format": ..., "block": ..., "double":
..., "targets": [paths]}` as its `quantization_config`. A tensor is called by the path of its
parameter, stacked layers and all; a quantised parameter is `PATH/codes` and `PATH/scales`, or
`PATH/scales/codes`, `/absmax` and `/mean` where scales are in 8 bits too.
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

from jpeft import files
from jpeft._disk import listed
from jpeft.hf.files import CheckpointError, Lazy, Tensors, read_config
from jpeft.hf.names import Family, Place
from jpeft.hf.plan import REAL
from jpeft.hf.stacking import Form, form
from jpeft.leaf import Leaf
from jpeft.paths import TargetError, flatten, match
from jpeft.quantize import Quantize
from jpeft.quantized import Quantized

VERSION = 1
_TYPES = {"uint8": "U8", "int8": "I8", "float32": "F32"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a directory in our layout gives: values by path, and the paths that it lacks."""

    values: dict[str, Any]
    new: tuple[str, ...]
    ignored: tuple[str, ...]


def without_quantization(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` without the entry on how weights are quantised, which has been looked at.

    **Raises:** `CheckpointError` for a method, or a layout, that is not read.
    """
    about: Any = config.get("quantization_config")
    if not about:
        return config
    method = about.get("quant_method") if isinstance(about, dict) else None
    where = f"{directory / 'config.json'}: quantization_config"
    if method == "bitsandbytes" and about.get("load_in_8bit"):
        raise CheckpointError(
            f"{where} says that bitsandbytes quantised the weights to 8 bits: of its checkpoints "
            "those of 4 bits are read. Take the model before quantisation, and pass "
            "quantize=jpeft.Quantize(pattern, 'int8')"
        )
    if method == "jpeft":
        _quantize(where, about)
    elif method != "bitsandbytes":
        raise CheckpointError(
            f"{where} says that the weights were quantised by '{method}': 'bitsandbytes' (in 4 "
            "bits) and 'jpeft' are read. Take the model before quantisation"
        )
    return {k: v for k, v in config.items() if k != "quantization_config"}


def saved_as(directory: pathlib.Path) -> Quantize | None:
    """How the weights of a directory in our layout were quantised; None for any other directory.

    **Raises:** `CheckpointError` for another version of the layout.
    """
    if not (directory / "config.json").is_file():
        return None
    about: Any = read_config(directory).get("quantization_config")
    if not isinstance(about, dict) or about.get("quant_method") != "jpeft":
        return None
    return _quantize(f"{directory / 'config.json'}: quantization_config", about)


def describe(params: Any) -> dict[str, Any]:
    """The `quantization_config` of a tree.

    **Raises:** `ValueError` for a tree without quantised weights, or with several kinds of them.
    """
    every = flatten(params)
    leaves = {p: x for p, x in every.items() if isinstance(x, Quantized)}
    for path, leaf in every.items():
        if isinstance(leaf, Leaf) and path not in leaves:
            raise ValueError(
                f"'{path}' is {type(leaf).__name__}: only quantised weights have a form in files. "
                "Save the base, and what is trained with jpeft.save"
            )
    if not leaves:
        raise ValueError(
            "no weight of these parameters is quantised: make them with jpeft.Quantize, or write "
            "them with save_model"
        )
    kinds = {_kind(x): p for p, x in reversed(leaves.items())}
    if len(kinds) > 1:
        said = ", ".join(f"'{p}' is {k}" for k, p in kinds.items())
        raise ValueError(
            f"a directory has weights quantised in one way, and {said}: write this tree with "
            "jpeft.save"
        )
    name, block, double, outliers = next(iter(kinds))
    about: dict[str, Any] = {"quant_method": "jpeft", "version": VERSION, "format": name}
    about |= {"block": block, "double": double, "targets": list(leaves)}
    return about | ({"outliers": outliers} if outliers else {})


def lazy_leaves(params: Any, table: Mapping[str, Place]) -> dict[str, Lazy]:
    """Every tensor of our layout, by name, read when its turn comes.

    **Raises:** `ValueError` for a weight whose blocks do not run along its inputs.
    """
    out: dict[str, Lazy] = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, Quantized):
            _check_axes(path, leaf, table[path])
        for name, array in _named(path, leaf).items():
            read = functools.partial(np.asarray, array)
            out[name] = Lazy(array.size * array.dtype.itemsize, read)
    return out


def load_leaves(
    tensors: Tensors,
    quantize: Quantize,
    want: Mapping[str, Any],
    table: Mapping[str, Place],
    family: Family,
    sharding: Callable[[str, Any], Any] | None,
) -> Found:
    """Every parameter of a directory in our layout, on its devices.

    **Arguments:** `want`, path to shape and type; `sharding`, as `load_params`'.

    **Raises:** `CheckpointError` with every missing, unexpected, misshapen and mistyped tensor.
    """
    try:
        chosen = set(match(quantize.targets, want))
    except TargetError as e:
        raise CheckpointError(
            f"{tensors.directory} has a weight quantised that this model does not have: {e}"
        ) from e
    where = {p: None if sharding is None else sharding(p, x) for p, x in want.items()}
    forms: dict[str, Form] = {
        p: form(quantize, p, want[p], table[p].stacked, where[p], by_layer=False)
        for p in want
        if p in chosen
    }
    have = set(tensors.names())
    problems: list[str] = []
    new: list[str] = []
    ignored: list[str] = []
    used: set[str] = set()
    for path, leaf in want.items():
        named = _named(path, forms[path].whole if path in forms else leaf)
        if not have & set(named) and re.search(family.new, path):
            new.append(path)
            continue
        used |= set(named)
        found = [_problem(tensors, n, x, path in forms) for n, x in named.items()]
        wrong = [p for p in found if p]
        if any("misshapen" in p for p in wrong) and re.search(family.replaced, path):
            new.append(path)
            ignored += named
        else:
            problems += wrong
    problems += [f"unexpected: {n}" for n in sorted(have - used)]
    if problems:
        raise CheckpointError(listed(f"{tensors.directory} does not hold this model", problems))
    values: dict[str, Any] = {}
    for path in (p for p in want if p not in new):
        if path in forms:
            values[path] = _read(tensors, path, forms[path])
        else:
            value = tensors.read(path).astype(want[path].dtype, copy=False)
            values[path] = jax.device_put(value, where[path])
    return Found(values, tuple(new), tuple(ignored))


def _kind(leaf: Quantized) -> tuple[str, int, bool, int]:
    double = leaf.scales is not None and not hasattr(leaf.scales, "shape")
    return leaf.format, leaf.block, double, leaf.outliers


def _quantize(where: str, about: Mapping[str, Any]) -> Quantize:
    version = about.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{where} has version {version} of the layout: this jpeft reads version {VERSION}. "
            "Update jpeft, or quantise the model again"
        )
    try:
        targets = [f"^{re.escape(str(p))}$" for p in about["targets"]]
        # 8 bits have one scale for each output: no blocks.
        block = int(about["block"]) or 64
        double, outliers = bool(about["double"]), int(about.get("outliers", 0))
        return Quantize(targets, about["format"], block, double, outliers=outliers)
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{where} cannot be read: {e!r}") from e


def _named(path: str, leaf: Any) -> dict[str, Any]:
    """A parameter's arrays by their names in a file."""
    if not isinstance(leaf, Quantized):
        return {path: leaf}
    return {f"{path}/{name}": array for name, array in files.names(leaf).items()}


def _check_axes(path: str, leaf: Quantized, spot: Place) -> None:
    if leaf.blocked != -2 or leaf.inner != 2 or leaf.leading != int(spot.stacked):
        raise ValueError(
            f"'{path}' has its blocks along axis {leaf.blocked} of {leaf.ndim}: a directory has "
            "them along the inputs, (in, out). Write this tree with jpeft.save"
        )


def _problem(tensors: Tensors, name: str, want: Any, exact: bool) -> str | None:
    if name not in tensors.names():
        return f"missing: {name}"
    shape, kind = tensors.shape(name), tensors.kind(name)
    if shape != tuple(want.shape):
        return f"misshapen: {name} is {shape}, not {tuple(want.shape)}"
    kinds = (_TYPES[str(jnp.dtype(want.dtype))],) if exact else REAL
    if kind not in kinds:
        return f"mistyped: {name} is {kind}, not {' or '.join(kinds)}"
    return None


def _read(tensors: Tensors, path: str, made: Form) -> Quantized:
    shapes, treedef = jax.tree.flatten(made.whole)
    where = [None] * len(shapes) if made.where is None else jax.tree.leaves(made.where)
    names = _named(path, made.whole)
    arrays = [
        # Waited for, or the next tensor is read while the host still holds this one.
        jax.block_until_ready(jax.device_put(tensors.read(n), w))
        for n, w in zip(names, where, strict=True)
    ]
    return jax.tree.unflatten(treedef, arrays)
