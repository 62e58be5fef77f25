"""Runs in random subspaces beside full fine-tuning, and d90 (Aghajanyan et al. 2021).

d90 is the smallest d whose score reaches 90% of full fine-tuning's, on the same metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments import lora_glue
from experiments.common.metrics import majority

KINDS = {"DID": "subspace", "SAID": "said"}
SHARE = 0.9


def changes(dims: Sequence[int], full: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the runs `full`, `DID_d` and `SAID_d` change in a `lora_glue` configuration.

    **Arguments:** `full`, what full fine-tuning changes besides its method.
    """
    out: dict[str, dict[str, Any]] = {"full": {"method": "full", "lr": None, **full}}
    for kind, method in KINDS.items():
        for d in dims:
            out[f"{kind}_{d}"] = {"method": method, "dimensions": d}
    return out


def smallest(scores: Mapping[int, float], full: float) -> int | None:
    """d90 of one kind: the smallest d that reaches, None where none does.

    **Arguments:** `scores`, by d; `full`, full fine-tuning's.
    """
    return next((d for d in sorted(scores) if scores[d] >= SHARE * full), None)


def constant(trainer: Any, state: Any, prepared: lora_glue.Prepared) -> dict[str, Any]:
    """For a run's result: the scores of answering the largest class always."""
    del trainer, state
    task = prepared.data.task
    return {"constant": majority(task.metrics, prepared.labels, len(task.labels))}


def hollow(metric: str, trivial: float, full: float) -> str | None:
    """A note where answering the largest class alone reaches the mark, else None."""
    mark = SHARE * full
    if trivial < mark:
        return None
    return (
        f"note: answering the largest class alone has {metric} {trivial:.4f}, which is above "
        f"the 90% mark of {mark:.4f}: on this metric d90 says little"
    )
