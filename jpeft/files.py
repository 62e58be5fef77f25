"""A trained state on disk: one safetensors file, names being the tree's paths."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jpeft._disk import CheckpointError, atomically, open_tensors


def names(trainable: Any) -> dict[str, Any]:
    """The arrays of a trained state by name, such as `0/encoder/.../kernel/a`."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save(
    path: str | pathlib.Path, trainable: Any, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a trained state, bit for bit.

    **Arguments:** `metadata`, text to keep with it, such as how the transform was made.

    **Raises:** `OSError` (a full disk, no permission); then what stood there still does.
    """
    arrays = {k: np.ascontiguousarray(v) for k, v in names(trainable).items()}
    # One entry: the format does not keep the order of several, and equal states are equal files.
    about = {"jpeft": json.dumps(dict(metadata or {}), sort_keys=True)}
    atomically({pathlib.Path(path): lambda p: save_file(arrays, p, metadata=about)})


def load(path: str | pathlib.Path, like: Any) -> Any:
    """Read a trained state.

    **Arguments:** `like`, a tree of the same arrays or of their shapes: what the transform's
    `init` gives, also under `jax.eval_shape`.

    **Raises:** `jpeft.hf.CheckpointError` for a damaged file, and for one that was saved from
    another transform or model, with the first names and shapes that differ.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    file = open_tensors(path)
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
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        listed = "".join(f"\n  {p}" for p in problems[:6])
        raise CheckpointError(f"{path} belongs to another transform or model:{listed}{more}")
    leaves = [jnp.asarray(file.get_tensor(n)).astype(want[n].dtype) for n in want]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
