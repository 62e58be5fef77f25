"""`metrics.jsonl`, one line a record, and TensorBoard events beside it when asked."""

from __future__ import annotations

import json
import pathlib
from types import TracebackType
from typing import Any, Self, TextIO


class MetricsLog:
    """Records of a run, each with its `step`.

    **Arguments:** `folder`, None for nowhere; `resume`, keep the lines that are there. A resumed
    run starts at a checkpoint: when its first record comes, older ones of that step and later are
    taken out, so that every step stands there once.

    **Raises:** `ValueError` when TensorBoard is asked for and its writer is not installed.
    """

    def __init__(
        self, folder: pathlib.Path | None, *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        self._file: TextIO | None = None
        self._path = None if folder is None else folder / "metrics.jsonl"
        self._resume, self._events = resume, None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                self._events = _events(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Add a record."""
        if self._path is None:
            return
        if self._file is None:
            kept = _before(self._path, entry["step"]) if self._resume else ""
            self._path.write_text(kept, encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in entry.items():
                if name != "step":
                    self._events.add_scalar(name, value, entry["step"])


def _before(path: pathlib.Path, step: int) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return "".join(line for line in whole if json.loads(line)["step"] < step)


def _events(folder: pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise ValueError(
            "--tensorboard needs tensorboardX: install the extra, jpeft[tensorboard]"
        ) from e
    return SummaryWriter(str(folder))
