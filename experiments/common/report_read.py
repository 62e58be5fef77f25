"""The results under a folder: each `result.json`, with the pictures beside it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

PICTURES = (".svg", ".png")


class ReportError(ValueError):
    """A result that cannot be read, or lacks what it is read for; names the file."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One result.

    **Attributes:** `name`, its folder from where results are, with slashes; `folder`, where it is;
    `pictures`, files beside it, of each plot one.
    """

    name: str
    folder: pathlib.Path
    data: Mapping[str, Any]
    pictures: tuple[pathlib.Path, ...]

    @property
    def path(self) -> pathlib.Path:
        """The file."""
        return self.folder / "result.json"

    @property
    def experiment(self) -> str:
        """Which experiment made it: as it says itself, or the first folder of its name."""
        return str(self.data.get("experiment", self.name.split("/")[0]))


def read_results(root: pathlib.Path) -> list[Result]:
    """Every result under a folder, by name; below a folder that holds a run are parts of it.

    **Raises:** `ReportError` where there is none, where one cannot be read, and where a folder
    holds a run or pictures without a result.
    """
    if not root.is_dir():
        raise ReportError(f"{root} is no folder: --results is where result.json files are")
    folders = sorted({p.parent for p in root.rglob("*") if p.is_file()})
    runs = [f for f in folders if _is_run(f)]
    results: list[Result] = []
    for folder in runs:
        if any(other in folder.parents for other in runs):
            continue
        name = folder.relative_to(root).as_posix()
        results.append(_read(folder, root.name if name == "." else name))
    if not results:
        raise ReportError(f"{root} holds no result.json")
    return results


def _is_run(folder: pathlib.Path) -> bool:
    marks = [folder / "result.json", folder / "config.json"]
    return any(p.exists() for p in marks) or bool(_pictures(folder))


def _pictures(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Of each plot the SVG, or the PNG where there is no SVG."""
    found: dict[str, pathlib.Path] = {}
    for ending in reversed(PICTURES):
        found |= {p.stem: p for p in folder.glob(f"*{ending}")}
    return tuple(found[stem] for stem in sorted(found))


def _read(folder: pathlib.Path, name: str) -> Result:
    path = folder / "result.json"
    if not path.is_file():
        raise ReportError(f"{path} is absent, and its folder holds a run: it was cut, or lost")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ReportError(f"{path} is no JSON: {e}") from e
    if not isinstance(data, dict):
        raise ReportError(f"{path}: a result is an object, and this is a {type(data).__name__}")
    for key in ("machine", "versions"):
        if not isinstance(data.get(key), dict):
            raise ReportError(f"{path} lacks '{key}'")
    return Result(name, folder, data, _pictures(folder))
