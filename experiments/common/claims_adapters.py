"""Claims on adapters: score against trained parameters, over several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.common import claims_scores as scores
from experiments.common.claims import POINTS, Claim, Results, Verdict, decide, undecided
from experiments.common.claims_intervals import of_groups

SECTION = "Adapters"
SOURCE = "Houlsby et al. 2019"
TASKS = 5  # as many as percentiles over tasks have to be of
SHARE = 0.04  # of the parameters: the paper's 3.6%
CLOSE = 0.01  # a point
COMMAND = (
    "python -m experiments.adapter_size --tasks sst2 mrpc cola rte qnli --data DIR --seeds 3 "
    "--sizes 1 8 64 256 --layers 1 2 3 --out docs/results/adapter_size/glue"
)


def claims() -> tuple[Claim, ...]:
    """All of them."""
    return (
        Claim(
            "3a",
            SECTION,
            "Adapters of at most 4% of the parameters are at most a point below full fine-tuning.",
            f"{SOURCE}, table 1",
            "GLUE, BERT-large: 80.0 with 3.6% of the parameters a task, against 80.4",
            ("adapter_size",),
            judge_full,
            COMMAND,
        ),
        Claim(
            "3b",
            SECTION,
            "Adapters are above tuning the top layers with as many parameters or more.",
            f"{SOURCE}, figures 1 and 3",
            "at equal parameters adapters lose little, and the top layers alone much",
            ("adapter_size",),
            judge_top,
            COMMAND,
            accepts=lambda r: bool(r["config"]["layers"]),
        ),
    )


def judge_full(results: Results) -> Verdict:
    """The largest adapters under the share, less full fine-tuning, mean over tasks."""
    (result,) = results
    rows = [r for r in result["points"]["adapter"] if r["share"] <= SHARE]
    if not rows:
        return undecided(_ours(result), f"no adapters of {SHARE:.0%} of the parameters or fewer")
    size = max(rows, key=lambda r: r["trained"])["number"]
    parts = {
        t: _less(result, f"{t}_adapter_{size}", f"{t}_full") for t in result["config"]["tasks"]
    }
    return _judged(result, parts, -CLOSE, f"adapters of {size} less full")


def judge_top(results: Results) -> Verdict:
    """The largest adapters with no more parameters than the fewest top layers, less those."""
    (result,) = results
    top = min(result["points"]["top"], key=lambda r: r["trained"])
    rows = [r for r in result["points"]["adapter"] if r["trained"] <= top["trained"]]
    if not rows:
        return undecided(_ours(result), f"every adapter has more than top {top['number']}'s")
    size = max(rows, key=lambda r: r["trained"])["number"]
    parts = {
        t: _less(result, f"{t}_adapter_{size}", f"{t}_top_{top['number']}")
        for t in result["config"]["tasks"]
    }
    return _judged(result, parts, 0.0, f"adapters of {size} less top {top['number']}")


def _less(result: Mapping[str, Any], a: str, b: str) -> list[float]:
    return list(scores.less(scores.of_run(result, a), scores.of_run(result, b)).values())


def _judged(
    result: Mapping[str, Any], parts: Mapping[str, list[float]], line: float, what: str
) -> Verdict:
    if len(parts) < TASKS:
        return undecided(_ours(result), f"{len(parts)} of the {TASKS} tasks that it takes at least")
    if min(len(x) for x in parts.values()) < 2:
        return undecided(_ours(result), "there are fewer than two seeds: no interval")
    found = of_groups(list(parts.values()), "tasks, and their seeds")
    return decide(found, line, POINTS, what=f"{what}, mean over tasks", ours=_ours(result))


def _ours(result: Mapping[str, Any]) -> str:
    """Of each size the percentiles over tasks and seeds, relative to full fine-tuning."""
    parts: list[str] = []
    for kind, rows in result["points"].items():
        for r in rows:
            low, middle, high = (POINTS.text(x) for x in _all(result, kind, r["number"]))
            name = f"adapters of {r['number']}" if kind == "adapter" else f"top {r['number']}"
            parts.append(f"{name} ({r['share']:.2%}): {middle} ({low} to {high})")
    tasks = ", ".join(result["config"]["tasks"])
    return (
        "; ".join(parts)
        + f" points relative to full, median (20th to 80th percentile) over seeds and {tasks}"
    )


def _all(result: Mapping[str, Any], kind: str, number: int) -> tuple[float, ...]:
    values: list[float] = []
    for task in result["config"]["tasks"]:
        full = scores.of_run(result, f"{task}_full")
        mean = sum(full.values()) / len(full)
        values += [x - mean for x in scores.of_run(result, f"{task}_{kind}_{number}").values()]
    return tuple(float(x) for x in np.percentile(values, (20, 50, 80)))
