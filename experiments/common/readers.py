"""Rows out of tsv and json files, with errors that name the file, the line and the column."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol


class DataError(ValueError):
    """Data that cannot be read as the task asked for; says where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One example: one or two texts, the label (a class number, or a score), and its identity."""

    texts: tuple[str, ...]
    label: float
    id: str = ""


class Columns(Protocol):
    """What of a task a reader needs to know."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def text(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def label(self) -> tuple[str, ...]: ...
    @property
    def bare(self) -> tuple[str, ...]: ...


def read_rows(path: pathlib.Path, task: Columns) -> list[Row]:
    """Every example of a file.

    **Raises:** `DataError` for an empty file, an absent column, a short line, or a label that is
    none of the task's.
    """
    if path.suffix == ".json":
        header, lines = _read_json(path)
    else:
        header, lines = read_table(path, task.bare)
    texts = [_column(path, header, names) for names in task.text]
    label = _column(path, header, task.label)
    ids = [header.index(n) for n in ("#1 ID", "#2 ID") if n in header]
    rows: list[Row] = []
    for number, cells in lines:
        if len(cells) <= max(*texts, label):
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}"
            )
        rows.append(
            Row(
                tuple(cells[i] for i in texts),
                _label(path, number, cells[label], task),
                "-".join(cells[i] for i in ids),
            )
        )
    if not rows:
        raise DataError(f"{path} has no examples")
    return rows


def read_table(
    path: pathlib.Path, bare: Sequence[str]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A tsv's header and numbered lines. Quotes are literal; a file whose first line already holds
    an example (as many cells as `bare`, a number where the label is) gets `bare` for its header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise DataError(f"{path}: there is no such file") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    lines = [(i, line.split("\t")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    lines = [(i, [c.rstrip("\r") for c in cells]) for i, cells in lines]
    if not lines:
        raise DataError(f"{path} is empty")
    first = lines[0][1]
    if "label" in bare and len(first) == len(bare) and first[bare.index("label")].isdigit():
        return list(bare), lines
    return first, lines[1:]


def _read_json(path: pathlib.Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path} is no JSON: {e}") from e
    records = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{path} holds no list of records")
    header = list(dict.fromkeys(k for r in records[:1] for k in r))
    try:
        return header, [(i, [str(r[k]) for k in header]) for i, r in enumerate(records, 1)]
    except KeyError as e:
        raise DataError(f"{path}: a record has no {e}, which the first one has") from e


def _column(path: pathlib.Path, header: list[str], names: Sequence[str]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise DataError(
        f"{path} has no column {' or '.join(repr(n) for n in names)}; its columns are "
        f"{', '.join(repr(h[:40]) for h in header)}"
    )


def _label(path: pathlib.Path, line: int, cell: str, task: Columns) -> float:
    if not task.labels:
        try:
            return float(cell)
        except ValueError as e:
            raise DataError(f"{path}, line {line}: the score '{cell}' is no number") from e
    if cell in task.labels:
        return task.labels.index(cell)
    if cell.isdigit() and int(cell) < len(task.labels):
        return int(cell)
    raise DataError(
        f"{path}, line {line}: the label '{cell[:40]}' is none of {task.name}'s "
        f"({', '.join(task.labels)})"
    )
