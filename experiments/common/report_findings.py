"""Claims brought together with the results that bear on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.claims import Claim, Verdict
from experiments.common.report import model_title
from experiments.common.report_read import ReportError, Result

# What of a configuration may differ between the runs of one finding.
FREE = {"seed", "out", "overwrite", "resume", "processes", "data", "save_every", "tensorboard"}


@dataclasses.dataclass(frozen=True)
class Again:
    """The same commands run another time.

    **Attributes:** `verdict`, from them alone; `kind`, how they stand to the first time, in words.
    """

    results: tuple[Result, ...]
    verdict: Verdict
    kind: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """A verdict on a claim, and the results it is of.

    **Attributes:** `label`, which task and model; `results` differ in their seed alone; `verdict`,
    None where nothing was run; `command`, where nothing was run what would, a line a task;
    `again`, where the results were made a second time.
    """

    label: str
    results: tuple[Result, ...]
    verdict: Verdict | None
    command: str = ""
    again: Again | None = None


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with all its findings: one at least."""

    claim: Claim
    findings: tuple[Finding, ...]


def judge(claim: Claim, results: Sequence[Result]) -> Judged:
    """Hold a claim against the results that bear on it.

    **Raises:** `ReportError` for a result that lacks what the claim reads.
    """
    if not claim.experiments:
        return Judged(claim, (Finding("", (), claim.judge([])),))
    bearing = [r for r in results if bears_on(r, claim)]
    groups = grouped(bearing) if claim.pooled else [[r] for r in bearing]
    findings: list[Finding] = []
    for group in groups:
        verdict = verdict_on(claim, group)
        findings.append(Finding(label_of(group[0].data) or group[0].name, tuple(group), verdict))
    done = {task_of(f.results[0].data) for f in findings}
    missing = [t for t in claim.wanted if t not in done]
    if missing:
        commands = "\n".join(claim.command.format(task=t) for t in missing)
        findings.append(Finding(", ".join(missing), (), None, commands))
    elif not findings:
        findings.append(Finding("", (), None, claim.command))
    return Judged(claim, tuple(findings))


def verdict_on(claim: Claim, results: Sequence[Result]) -> Verdict:
    """What results that differ in their seed alone say of a claim. **Raises:** as `judge`."""
    where = ", ".join(str(r.path) for r in results)
    return _Named(where, claim).call(claim.judge, [r.data for r in results])


def bears_on(result: Result, claim: Claim) -> bool:
    """Whether a claim is judged from a result. **Raises:** as `judge`."""
    if result.experiment not in claim.experiments:
        return False
    return _Named(str(result.path), claim).call(claim.accepts, result.data)


@dataclasses.dataclass(frozen=True)
class _Named:
    """Calls whose errors, of a result of another form, name the file and the claim."""

    where: str
    claim: Claim

    def call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
            raise ReportError(
                f"{self.where}: not of the form that claim {self.claim.id} reads: "
                f"{type(e).__name__}: {e}"
            ) from e


def grouped(results: Sequence[Result]) -> list[list[Result]]:
    """Results that differ in their seed alone together; a seed that comes again stands apart."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        config = result.data.get("config")
        if not isinstance(config, dict) or "seed" not in config:
            groups[result.name] = [result]
            continue
        same = {k: v for k, v in config.items() if k not in FREE}
        key = json.dumps([result.experiment, same], sort_keys=True, default=str)
        seeds = [r.data["config"]["seed"] for r in groups.get(key, [])]
        key = f"{key} {result.name}" if config["seed"] in seeds else key
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def task_of(result: Mapping[str, Any]) -> str:
    """The task, or the tasks; empty where there is none."""
    config = result.get("config") or {}
    if "tasks" in config and isinstance(config["tasks"], list):
        return ", ".join(config["tasks"])
    return str(result.get("task") or config.get("task") or "")


def label_of(result: Mapping[str, Any]) -> str:
    """Task and model, as far as a result has them."""
    config = result.get("config") or {}
    model = model_title(config["model"]) if config.get("model") else ""
    if "models" in result:
        count = len(result["models"])
        model = f"{count} model" if count == 1 else f"{count} models"
    return ", ".join(x for x in (task_of(result), model) if x)


def unclaimed(results: Sequence[Result], judged: Sequence[Judged]) -> list[Result]:
    """Results that no claim was judged from."""
    used = {r.name for j in judged for f in j.findings for r in f.results}
    return [r for r in results if r.name not in used]
