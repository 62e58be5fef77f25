"""Score against the number of dimensions of a random subspace, and d90, for DID and SAID.

d90 is the smallest d whose score reaches 90% of full fine-tuning's, on the same metric.
Without arguments: a few dimensions on the sample of this package.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import dimensions, runtime
from experiments.common.command import command
from experiments.common.dimensions import KINDS
from experiments.common.options import at_least, one_or_more
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

# Aghajanyan et al. 2021, table 1: d90 of MRPC.
PAPER = {
    "SAID": {"BERT-base": 1608, "BERT-large": 1037, "RoBERTa-base": 896, "RoBERTa-large": 207},
    "DID": {"BERT-base": 1861, "BERT-large": 2493, "RoBERTa-base": 1000, "RoBERTa-large": 322},
}


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run."""

    dims: tuple[int, ...] = (50, 500, 5000)
    """The numbers of dimensions; SAID's scales, one a layer, are among them."""
    full_epochs: int | None = None
    """Epochs of full fine-tuning; without it as many as the subspaces'."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, method="lora_glue", dimensions="--dims")
    one_or_more(config, "dims")
    at_least(config, full_epochs=1)
    full = {"epochs": config.full_epochs or config.epochs}
    runs = runs_of(config, dimensions.changes(config.dims, full))
    begin(config, runs, console, free=("dims",))
    results = sweep(runs, console, lambda name: dimensions.constant, config.processes)
    metric, whole = metric_of(results["full"], "full")
    scores = {
        kind: {str(d): metric_of(results[f"{kind}_{d}"], method)[1] for d in config.dims}
        for kind, method in KINDS.items()
    }
    d90 = {
        kind: dimensions.smallest({int(d): s["mean"] for d, s in by.items()}, whole["mean"])
        for kind, by in scores.items()
    }
    trivial = results["full"]["seeds"][0]["constant"][metric]
    result = write_result(
        config, results, metric=metric, full=whole, scores=scores, d90=d90, constant=trivial
    )
    console.print(table(config, result))
    note = dimensions.hollow(metric, trivial, whole["mean"])
    if note:
        console.print(note)
    draw(config, result, console)
    return result


def table(config: Config, result: dict[str, Any]) -> Table:
    """Dimensions down, DID and SAID across."""
    out = Table(title=f"{config.task}, validation {result['metric']}")
    out.add_column("d", justify="right")
    for kind in KINDS:
        out.add_column(kind, justify="right")
    for d in sorted(config.dims):
        cells = [result["scores"][kind][str(d)] for kind in KINDS]
        out.add_row(f"{d:,}", *(f"{c['mean']:.4f}" for c in cells))
    out.add_section()
    out.add_row("full", *[f"{result['full']['mean']:.4f}"] * 2)
    out.add_row("90%", *[f"{0.9 * result['full']['mean']:.4f}"] * 2)
    out.add_row("d90", *(str(result["d90"][k] or f"> {max(config.dims):,}") for k in KINDS))
    for model in PAPER["DID"]:
        out.add_row(f"d90, {model} (paper, MRPC)", *(f"{PAPER[k][model]:,}" for k in KINDS))
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Score against d, with the lines of full fine-tuning and of its 90%."""
    with figure(config.out, "intrinsic_dimension", source_line(result), console) as axes:
        if axes is None:
            return
        for colour, (kind, by) in zip(COLOURS, result["scores"].items(), strict=False):
            x = [int(d) for d in by]
            mean, std = ([v[k] for v in by.values()] for k in ("mean", "std"))
            axes.errorbar(x, mean, std, marker="o", capsize=3, color=colour, label=kind)
        whole = result["full"]["mean"]
        for y, name in ((whole, "full fine-tuning"), (0.9 * whole, "90% of it")):
            axes.axhline(y, color="0.4", linestyle="-" if y == whole else "--", linewidth=1)
            axes.annotate(name, (min(config.dims), y), va="bottom", fontsize=8, color="0.3")
        axes.axhline(result["constant"], color="0.7", linestyle=":", linewidth=1)
        axes.annotate(
            "largest class", (max(config.dims), result["constant"]), ha="right", fontsize=8,
            va="bottom", color="0.5",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(list(config.dims), [f"{d:,}" for d in config.dims])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("dimensions d of the subspace (log scale)")
        axes.set_ylabel(f"{config.task}, validation {result['metric']}")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("intrinsic_dimension", Config, main, __doc__))
