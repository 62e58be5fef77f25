"""A trained state on disk: one safetensors file, with its transform as JSON in the header."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jpeft._disk import CheckpointError, atomically, listed, open_tensors
from jpeft.config import VERSION, ConfigError, from_json, to_json
from jpeft.transform import Params, Trainable, Transform
from jpeft.uses import Uses


def names(trainable: Any) -> dict[str, Any]:
    """The arrays of a trained state by name, such as `0/encoder/.../kernel/a`."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save(
    path: str | pathlib.Path,
    trainable: Any,
    transform: Transform | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a trained state, bit for bit, and the transform that it belongs to.

    **Arguments:** `transform`, for `restore`; `metadata`, text to keep with it.

    **Raises:** `OSError` (a full disk, no permission); then what stood there still does.
    `jpeft.ConfigError` for a transform with a field that JSON has no form for.
    """
    arrays = {k: np.asarray(v, order="C") for k, v in names(trainable).items()}
    about: dict[str, Any] = {"version": VERSION, "metadata": dict(metadata or {})}
    if transform is not None:
        about["transform"] = to_json(transform)
    # One entry: the format does not keep the order of several, and equal states are equal files.
    header = {"jpeft": json.dumps(about, sort_keys=True)}
    atomically({pathlib.Path(path): lambda p: save_file(arrays, p, metadata=header)})


def load(path: str | pathlib.Path, like: Any) -> Any:
    """Read a trained state.

    **Arguments:** `like`, a tree of the same arrays or of their shapes: what the transform's
    `init` gives, also under `jax.eval_shape`.

    **Raises:** `jpeft.CheckpointError` for a damaged file, and for one that was saved from
    another transform or model, with the first names and shapes that differ.
    """
    path = pathlib.Path(path)
    file = _opened(path)
    want, have = names(like), set(file.keys())
    problems = [f"missing: {n}" for n in want if n not in have]
    problems += [f"unexpected: {n}" for n in sorted(have - set(want))]
    for name in [n for n in want if n in have]:
        piece = file.get_slice(name)
        if tuple(piece.get_shape()) != tuple(want[name].shape):
            problems.append(
                f"misshapen: {name} is {tuple(piece.get_shape())}, not {tuple(want[name].shape)}"
            )
    if problems:
        raise CheckpointError(listed(f"{path} belongs to another transform or model", problems))
    leaves = [jnp.asarray(file.get_tensor(n)).astype(want[n].dtype) for n in want]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_transform(path: str | pathlib.Path) -> Transform:
    """The transform that a trained state was saved with.

    **Raises:** `jpeft.CheckpointError` for a file without one, with a damaged header, of a newer
    format, with a type, an option or a value that this version does not know, naming the nearest
    known one, or with a Fastfood subspace of format 1.
    """
    path = pathlib.Path(path)
    about = _header(path)
    version = about.get("version", VERSION)
    if version > VERSION:
        raise CheckpointError(
            f"{path} has format {version}, this version reads {VERSION}: update jpeft"
        )
    if "transform" not in about:
        raise CheckpointError(f"{path} was saved without a transform")
    if version < 2 and '"projection": "fastfood"' in json.dumps(about):
        raise CheckpointError(
            f"{path} has format 1, whose Subspace had another projection for its seed: train it "
            "again, or merge it with the version that saved it"
        )
    try:
        return from_json(about["transform"])
    except ConfigError as e:
        raise CheckpointError(f"{path}: {e}") from e


def restore(
    path: str | pathlib.Path, params: Params, *, uses: Uses | None = None
) -> tuple[Transform, Trainable]:
    """The transform and the trained state of a file, for a model.

    **Arguments:** `params`, the model's parameters; `uses`, as for the transform's `init`.

    **Raises:** as `load` and `load_transform`.
    """
    transform = load_transform(path)

    def like() -> Trainable:
        return transform.init(jax.random.key(0), params, uses=uses)

    return transform, load(path, jax.eval_shape(like))


def _header(path: pathlib.Path) -> dict[str, Any]:
    """What `save` wrote of the transform; nothing where the file has no such entry."""
    text = (_opened(path).metadata() or {}).get("jpeft", "{}")
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("version", VERSION), int):
        raise CheckpointError(f"{path} has a damaged header: 'jpeft' is {text[:80]!r}")
    return about


def _opened(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    return open_tensors(path)
