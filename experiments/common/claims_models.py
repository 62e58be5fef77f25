"""Models of several sizes in one result: which to compare, and how a figure goes with size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Model = Mapping[str, Any]


def name_of(model: Model) -> str:
    """Family and size."""
    return " ".join(x for x in (model.get("family"), model["size"]) if x)


def last_of_each(models: Sequence[Model]) -> list[Model]:
    """Each size's model at the end of its pre-training, from small to large."""
    last: dict[str, Model] = {}
    for model in sorted(models, key=_age):
        last[name_of(model)] = model
    return sorted(last.values(), key=lambda m: m["parameters"])


def along_training(models: Sequence[Model]) -> dict[str, list[Model]]:
    """Of each size that has several, its checkpoints in their order."""
    out: dict[str, list[Model]] = {}
    for model in sorted(models, key=_age):
        out.setdefault(name_of(model), []).append(model)
    return {name: found for name, found in out.items() if len(found) > 1}


def _age(model: Model) -> float:
    # Without a step it is the published model, at the end.
    step = model.get("step")
    return math.inf if step is None else step


def weights_of_slope(
    x: Sequence[float], groups: Sequence[str] | None = None
) -> tuple[float, ...] | None:
    """What to weigh values by to get the slope of their least-squares line over `x`.

    **Arguments:** `groups`, of which each has a line of its own at the common slope.

    None where no group has two different `x`.
    """
    groups = groups or [""] * len(x)
    pairs = list(zip(x, groups, strict=True))
    means = {g: statistics.fmean(v for v, h in pairs if h == g) for g in groups}
    centred = [v - means[g] for v, g in pairs]
    squares = sum(v * v for v in centred)
    return tuple(v / squares for v in centred) if squares else None


def families(models: Sequence[Model]) -> list[str]:
    """Each model's family."""
    return [str(m.get("family", "")) for m in models]


def doublings(models: Sequence[Model]) -> list[float]:
    """The binary logarithm of each model's parameters."""
    return [math.log2(m["parameters"]) for m in models]
