"""Directories of safetensors, read and written: one file, or several with an index."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes as _  # noqa: F401  # gives numpy bfloat16, in which many checkpoints are
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jpeft._disk import CheckpointError as CheckpointError
from jpeft._disk import atomically, open_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Bytes of a tensor that are compared at once.
PIECE = 2**24
_UNREADABLE = (SafetensorError, OSError, TypeError, AttributeError)
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "tf_model.h5")


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The contents of `config.json`. **Raises:** `CheckpointError`."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: it is not a model's directory")
    return read_json(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. **Raises:** `CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


class Tensors:
    """The tensors of a directory by name; one is read at a time.

    **Raises:** `CheckpointError` for a file that is absent, truncated or damaged, an index that
    points outside the directory, or weights that are pickled.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.files = self._files()
        self._where = {
            name: path
            for path in self.files
            for name in open_tensors(path).keys()  # noqa: SIM118
        }

    def _files(self) -> list[pathlib.Path]:
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        index = self.directory / INDEX
        if not index.is_file():
            pickled = [p for p in PICKLED if (self.directory / p).exists()]
            if pickled:
                raise CheckpointError(
                    f"{self.directory} has its weights in {pickled[0]}, which is not read (loading "
                    "a pickle runs code): convert it with transformers, "
                    "model.save_pretrained(directory, safe_serialization=True)"
                )
            raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}")
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} has no weight_map")
        paths: list[pathlib.Path] = []
        for name in dict.fromkeys(str(v) for v in shards.values()):  # pyright: ignore
            if pathlib.PurePath(name).name != name:
                raise CheckpointError(f"{index} points outside its directory: '{name}'")
            if not (self.directory / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is absent")
            paths.append(self.directory / name)
        return paths

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, read from the header."""
        return tuple(open_tensors(self._where[name]).get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """A tensor's type as the header has it: `F32`, `BF16`, `I64` and so on."""
        return open_tensors(self._where[name]).get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the file's type."""
        try:
            return open_tensors(self._where[name]).get_tensor(name)
        except _UNREADABLE as e:
            raise CheckpointError(f"{self._where[name]}: cannot read '{name}': {e}") from e

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices are of one type and the same bit for bit; some rows of each are read
        at a time.
        """
        shape, kind = self.shape(one), self.kind(one)
        if len(shape) != 2 or (shape, kind) != (self.shape(other), self.kind(other)):
            return False
        try:
            a, b = (open_tensors(self._where[n]).get_slice(n) for n in (one, other))
            step = max(1, PIECE // (8 * shape[1] + 1))
            rows = (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))
            return all(a[r].tobytes() == b[r].tobytes() for r in rows)
        except _UNREADABLE as e:
            raise CheckpointError(f"{self.directory}: cannot read '{one}' or '{other}': {e}") from e


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor to write: `nbytes`, and what reads it when its turn comes."""

    nbytes: int
    read: Callable[[], np.ndarray]


def write(
    directory: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    shard_bytes: int = 5 * 10**9,
) -> None:
    """`config.json` and `model.safetensors`, or several files of at most `shard_bytes` with their
    index; each appears whole, by rename, and one file's tensors are in memory at a time.

    **Raises:** `OSError` (a full disk, no permission); then no file is touched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    files = {
        directory / name: functools.partial(_save, {t: tensors[t] for t in shard})
        for name, shard in zip(names, shards, strict=True)
    }
    texts: dict[str, Any] = {"config.json": dict(config)}
    if count > 1:
        where = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(t.nbytes for t in tensors.values())
        texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": where}
    for name, value in texts.items():
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        files[directory / name] = functools.partial(_save_text, text)
    atomically(files)
    # Of an earlier model in this folder, what a reader would take for a part of this one.
    for old in {SINGLE, INDEX, *(p.name for p in directory.glob("model-*-of-*.safetensors"))}:
        if directory / old not in files:
            (directory / old).unlink(missing_ok=True)


def _shards(tensors: Mapping[str, Lazy], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _save(tensors: Mapping[str, Lazy], path: pathlib.Path) -> None:
    arrays = {name: np.asarray(t.read(), order="C") for name, t in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt"})


def _save_text(text: str, path: pathlib.Path) -> None:
    path.write_text(text, encoding="utf-8")
