"""Files that appear whole or not at all, and safetensors files that are damaged."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it is asked to be; says which file, and why."""


def listed(head: str, problems: Sequence[str], most: int = 8) -> str:
    """An error of several lines: `head`, and the first `most` problems."""
    lines = "".join(f"\n  {p}" for p in problems[:most])
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return f"{head}:{lines}{more}"


def open_tensors(path: pathlib.Path) -> Any:
    """An open safetensors file. **Raises:** `CheckpointError` where it is damaged."""
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no complete safetensors file: {e}. "
            "Fetch it again"
        ) from e


def atomically(files: Mapping[pathlib.Path, Callable[[pathlib.Path], Any]]) -> None:
    """Write every file beside its place, then put all in place by rename.

    **Raises:** what a writer raises, `safetensors`' own errors as `OSError`; then no file of the
    set has changed, and nothing is left behind.
    """
    written: dict[pathlib.Path, pathlib.Path] = {}
    try:
        for path, writer in files.items():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            written[path] = pathlib.Path(name)
            try:
                writer(written[path])
            except SafetensorError as e:
                raise OSError(f"{path} could not be written: {e}") from e
            written[path].chmod(0o666 & ~_umask())
        for path, temporary in written.items():
            temporary.replace(path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
