"""Every method on one task: score, trained parameters, time of a step and its memory.

Without arguments: this package's encoder on its sample, one seed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command
from experiments.common.methods import METHODS, Method
from experiments.common.models import fetch_model
from experiments.common.options import at_least, one_or_more
from experiments.common.pipeline import Batches
from experiments.common.plots import COLOURS, figure, source_line
from experiments.common.sweep import (
    SweepConfig,
    begin,
    metric_of,
    refuse,
    runs_of,
    sweep,
    write_result,
)
from experiments.common.timing import timed_steps

ROUNDS = 7


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run."""

    methods: tuple[Method, ...] = METHODS
    """The methods, one run each."""
    long: tuple[Method, ...] = ("prompt", "prefix", "subspace", "said", "ia3")
    """Methods that learn slowly, and are given `--long-epochs`."""
    long_epochs: int | None = None
    """Epochs of the methods in --long; without it as many as the others'."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, method="--methods", lr="lora_glue")
    one_or_more(config, "methods")
    at_least(config, long_epochs=1)
    changes: dict[str, dict[str, Any]] = {m: {"method": m} for m in config.methods}
    for method in config.long:
        if method in changes and config.long_epochs is not None:
            changes[method]["epochs"] = config.long_epochs
    runs = runs_of(config, changes)
    begin(config, runs, console, free=("methods",))
    results = sweep(runs, console, processes=config.processes)
    steps = step_costs(config, runs, console)
    rows = {m: row(results[m], m) | steps[m] for m in config.methods}
    result = write_result(config, results, rows=rows)
    console.print(table(rows, config.seeds))
    draw(config, result, rows, console)
    return result


def step_costs(
    config: Config, runs: Mapping[str, lora_glue.Config], console: Console
) -> dict[str, dict[str, float]]:
    """Each method's `step_ms` and `memory_mib`: in turn on one batch of the task, after the runs,
    since a run's own mean is of whatever else the machine did then.
    """
    directory = fetch_model(config.model, console)
    prepared = lora_glue.prepare(config, directory)
    model = lora_glue.build(config, directory, max(1, len(prepared.data.task.labels)), 0)
    batches = Batches(prepared.train, prepared.train_shapes, prepared.pad, 0)
    trainers: dict[str, Any] = {}
    for method, run in runs.items():
        # For as many steps as the run had: it is the run's program, which is compiled already.
        trainers[method] = lora_glue.trainer_of(run, model, 0, run.steps(len(prepared.train)))
    costs = timed_steps(trainers, next(iter(batches)), ROUNDS)
    return {m: {"step_ms": c["ms"], "memory_mib": c["mib"]} for m, c in costs.items()}


def row(result: Mapping[str, Any], method: str) -> dict[str, Any]:
    """One method's scores, and what it trained."""
    metric, score = metric_of(result, method)
    return {
        "metric": metric,
        "mean": score["mean"],
        "std": score["std"],
        "trained": result["seeds"][0]["trained"],
        "steps": result["seeds"][0]["steps"],
    }


def table(rows: dict[str, dict[str, Any]], seeds: int) -> Table:
    """The rows as a terminal table, best first."""
    out = Table(title="validation" + (f", {seeds} seeds" if seeds > 1 else ""))
    metric = next(iter(rows.values()))["metric"]
    for name in ("method", metric, "trained", "steps", "ms a step", "MiB a step"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for method, r in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        score = f"{r['mean']:.4f}" + (f" ± {r['std']:.4f}" if seeds > 1 else "")
        cells = (f"{r['trained']:,}", f"{r['steps']:,}", f"{r['step_ms']:.0f}")
        out.add_row(method, score, *cells, f"{r['memory_mib']:,.0f}")
    return out


def draw(
    config: Config, result: dict[str, Any], rows: dict[str, dict[str, Any]], console: Console
) -> None:
    """Scores, best at the top, with each method's number of trained parameters."""
    ordered = sorted(rows.items(), key=lambda item: item[1]["mean"])
    size = (6.4, 1.2 + 0.26 * len(ordered))
    with figure(config.out, "compare_methods", source_line(result), console, size) as axes:
        if axes is None:
            return
        for y, (_, r) in enumerate(ordered):
            axes.errorbar(r["mean"], y, xerr=r["std"], fmt="o", capsize=3, color=COLOURS[0])
        names = [f"{method}  ({short(r['trained'])})" for method, r in ordered]
        axes.set_yticks(range(len(ordered)), names, fontsize=8)
        axes.set_xlabel(f"{config.task}, validation {ordered[0][1]['metric']}")
        axes.set_ylabel("method (trained parameters)")
        axes.grid(alpha=0.3, axis="x")


def short(count: int) -> str:
    """A number of parameters in few letters: 22.6M, 74k, 768."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("compare_methods", Config, main, __doc__))
