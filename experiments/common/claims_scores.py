"""Scores by seed, as experiments write them into their results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Seeds = dict[int, float]


def metric_of(run: Mapping[str, Any]) -> str:
    """The first metric of a run's task: the one to compare by."""
    return next(iter(run["metrics"][run["config"]["method"]]))


def of_run(result: Mapping[str, Any], name: str) -> Seeds:
    """One run's validation scores by seed, of a sweep's result."""
    run = result["runs"][name]
    metric = metric_of(run)
    return {s["seed"]: s["validation"][metric] for s in run["seeds"]}


def listed(score: Mapping[str, Any]) -> Seeds:
    """`values` by their place, which is their seed."""
    return dict(enumerate(score["values"]))


def less(a: Mapping[int, float], b: Mapping[int, float]) -> Seeds:
    """`a` less `b`, for the seeds of both."""
    return {s: a[s] - b[s] for s in sorted(a.keys() & b.keys())}


def mean_of(parts: Sequence[Mapping[int, float]]) -> Seeds:
    """Over several scores, such as models', the mean by seed, for the seeds of all."""
    if not parts:
        return {}
    shared = set(parts[0]).intersection(*parts[1:])
    return {s: statistics.fmean(p[s] for p in parts) for s in sorted(shared)}


def shown(scores: Mapping[int, float]) -> str:
    """Mean and deviation in percent."""
    values = [100 * x for x in scores.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def seeds(n: int) -> str:
    """So many seeds, in words."""
    return f"{n} seed" if n == 1 else f"{n} seeds"
