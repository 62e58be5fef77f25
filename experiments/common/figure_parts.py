"""What tables of committed results are made of."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.report import device_name, runs_elsewhere

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


class FiguresError(RuntimeError):
    """A marker without a table, or results that are not there."""


def read(*parts: str) -> dict[str, Any]:
    """One `result.json` under docs/results. **Raises:** `FiguresError` where it is absent."""
    path = RESULTS.joinpath(*parts, "result.json")
    if not path.is_file():
        raise FiguresError(f"{path} is absent: run the command that makes it, with that --out")
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is left, the others right."""
    line = "| " + " | ".join(header) + " |"
    rule = "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    return "\n".join([line, rule, *("| " + " | ".join(r) + " |" for r in rows)])


def source(result: Mapping[str, Any]) -> str:
    """Machine, versions and date, in words."""
    m, v = result["machine"], result["versions"]
    names = [n for n in ("jax", "flax", "torch", "transformers", "peft") if n in v]
    about = ", ".join(f"{n} {v[n]}" for n in names)
    return f"{device_name(m)}, {m['cores']} cores, {about}, {m['date']}{runs_elsewhere(result)}"


def score(value: Mapping[str, float]) -> str:
    """In points, mean and deviation."""
    text = f"{100 * value['mean']:.1f}"
    return f"{text} ± {100 * value['std']:.1f}" if value["std"] else text
