"""Score against trained parameters: adapters of several sizes beside tuning the top k layers.

Scores are relative to full fine-tuning on the same task; the lines are the 20th, 50th and 80th
percentiles over tasks and seeds. Without arguments: the sample of this package.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command
from experiments.common.options import one_or_more
from experiments.common.plots import COLOURS, figure, source_line
from experiments.common.sweep import (
    Results,
    SweepConfig,
    begin,
    metric_of,
    refuse,
    runs_of,
    sweep,
    write_result,
)

KINDS = {"adapter": "adapters", "top": "top layers"}


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run."""

    tasks: tuple[lora_glue.TaskName, ...] = ("sample",)
    """The tasks, each found in --data under its own name or GLUE's."""
    sizes: tuple[int, ...] = (1, 8, 64)  # type: ignore[assignment]
    """The adapters' sizes; the paper's are 1, 2, 4, ... 512."""
    layers: tuple[int, ...] = (1, 3)
    """Numbers of top layers to tune in place of adapters."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, method="lora_glue", task="--tasks", bottleneck="--sizes", top="--layers")
    one_or_more(config, "tasks")
    changes: dict[str, dict[str, Any]] = {}
    for task in config.tasks:
        of = {"task": task}
        changes[f"{task}_full"] = of | {"method": "full"}
        for size in config.sizes:
            changes[f"{task}_adapter_{size}"] = of | {"method": "adapter", "bottleneck": size}
        for k in config.layers:
            changes[f"{task}_top_{k}"] = of | {"method": "top", "top": k}
    runs = runs_of(config, changes)
    begin(config, runs, console, free=("tasks", "sizes", "layers"))
    results = sweep(runs, console, processes=config.processes)
    points = {
        kind: [point(config, results, kind, n) for n in numbers]
        for kind, numbers in (("adapter", config.sizes), ("top", config.layers))
    }
    result = write_result(config, results, points=points)
    console.print(table(points))
    draw(config, result, points, console)
    return result


def point(config: Config, results: Results, kind: str, number: int) -> dict[str, Any]:
    """One size over all tasks and seeds: trained parameters, and points below full fine-tuning."""
    differences: list[float] = []
    trained = share = 0.0
    for task in config.tasks:
        name, full = metric_of(results[f"{task}_full"], "full")
        run = results[f"{task}_{kind}_{number}"]
        differences += [100 * (s["validation"][name] - full["mean"]) for s in run["seeds"]]
        trained = run["seeds"][0]["trained"]
        share = trained / results[f"{task}_full"]["seeds"][0]["trained"]
    low, middle, high = (float(x) for x in np.percentile(differences, (20, 50, 80)))
    return {
        "number": number,
        "trained": int(trained),
        "share": share,
        "p20": low,
        "p50": middle,
        "p80": high,
    }


def table(points: dict[str, list[dict[str, Any]]]) -> Table:
    """Sizes down."""
    out = Table(title="points relative to full fine-tuning, over tasks and seeds")
    for name in ("", "trained", "share", "20th", "50th", "80th percentile"):
        out.add_column(name, justify="right" if name else "left")
    for kind, rows in points.items():
        for r in rows:
            label = f"adapters of {r['number']}" if kind == "adapter" else f"top {r['number']}"
            cells = (f"{r[k]:+.1f}" for k in ("p20", "p50", "p80"))
            out.add_row(label, f"{r['trained']:,}", f"{100 * r['share']:.2f}%", *cells)
    return out


def draw(config: Config, result: dict[str, Any], points: dict[str, Any], console: Console) -> None:
    """The medians, with a band from the 20th to the 80th percentile."""
    tasks = ", ".join(config.tasks)
    source = source_line(result | {"config": {**result["config"], "task": tasks}})
    with figure(config.out, "adapter_size", source, console) as axes:
        if axes is None:
            return
        for colour, (kind, rows) in zip(COLOURS, points.items(), strict=False):
            x = [r["trained"] for r in rows]
            axes.plot(x, [r["p50"] for r in rows], "o-", color=colour, label=KINDS[kind])
            low, high = ([r[k] for r in rows] for k in ("p20", "p80"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters a task (log scale)")
        axes.set_ylabel("score, points relative to full fine-tuning\n(20th to 80th percentile)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("adapter_size", Config, main, __doc__))
