"""LoRA's rank against the weights that it updates, beside the paper's table.

Without arguments: ranks 1, 4 and 8 on the sample of this package.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import runtime
from experiments.common.command import command
from experiments.common.options import one_or_more
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

WEIGHTS = {
    "q": (r"self/query/kernel$",),
    "q,v": (r"self/(query|value)/kernel$",),
    "q,k,v,o": (r"self/(query|key|value)/kernel$", r"attention/output/dense/kernel$"),
}
# Hu et al. 2021, table 6: GPT-3 175B, accuracy in percent.
PAPER = {
    "WikiSQL": {
        "q": {1: 68.8, 2: 69.6, 4: 70.5, 8: 70.4, 64: 70.0},
        "q,v": {1: 73.4, 2: 73.3, 4: 73.7, 8: 73.8, 64: 73.5},
        "q,k,v,o": {1: 74.1, 2: 73.7, 4: 74.0, 8: 74.0, 64: 73.9},
    },
    "MultiNLI": {
        "q": {1: 90.7, 2: 90.9, 4: 91.1, 8: 90.7, 64: 90.7},
        "q,v": {1: 91.3, 2: 91.4, 4: 91.3, 8: 91.6, 64: 91.4},
        "q,k,v,o": {1: 91.2, 2: 91.7, 4: 91.7, 8: 91.5, 64: 91.4},
    },
}


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run; alpha is twice the rank."""

    ranks: tuple[int, ...] = (1, 4, 8)
    """The ranks; the paper's are 1 2 4 8 64."""
    weights: tuple[str, ...] = tuple(WEIGHTS)
    """Which projections: q, "q,v", "q,k,v,o"."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, rank="--ranks", targets="--weights", method="lora_glue", alpha="lora_glue")
    one_or_more(config, "ranks", "weights")
    unknown = [w for w in config.weights if w not in WEIGHTS]
    if unknown:
        raise ValueError(f"--weights {unknown[0]}: there are {', '.join(WEIGHTS)}")
    changes = {
        f"{weights.replace(',', '')}_r{rank}": {
            "rank": rank,
            "alpha": 2.0 * rank,
            "targets": WEIGHTS[weights],
        }
        for weights in config.weights
        for rank in config.ranks
    }
    runs = runs_of(config, changes)
    begin(config, runs, console, free=("ranks", "weights"))
    results = sweep(runs, console, processes=config.processes)
    scores = {
        weights: {
            str(rank): metric_of(results[f"{weights.replace(',', '')}_r{rank}"], "lora")[1]
            for rank in config.ranks
        }
        for weights in config.weights
    }
    result = write_result(config, results, scores=scores)
    console.print(table(config, scores))
    draw(config, result, scores, console)
    return result


def table(config: Config, scores: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Weights down, ranks across, and the paper's below."""
    ranks = sorted({*config.ranks, 1, 2, 4, 8, 64})
    out = Table(title=f"{config.task}: score in percent by rank")
    out.add_column("weights")
    for rank in ranks:
        out.add_column(f"r {rank}", justify="right")
    for weights, by in scores.items():
        out.add_row(
            weights,
            *(f"{100 * by[str(r)]['mean']:.1f}" if str(r) in by else "" for r in ranks),
        )
    for task, rows in PAPER.items():
        out.add_section()
        for weights, by in rows.items():
            out.add_row(
                f"{weights} (paper, {task})", *(f"{by[r]}" if r in by else "" for r in ranks)
            )
    return out


def draw(config: Config, result: dict[str, Any], scores: dict[str, Any], console: Console) -> None:
    """Score against rank, one line a set of weights."""
    with figure(config.out, "lora_rank", source_line(result), console) as axes:
        if axes is None:
            return
        for colour, (weights, by) in zip(COLOURS, scores.items(), strict=False):
            x = [int(r) for r in by]
            mean, std = ([100 * v[k] for v in by.values()] for k in ("mean", "std"))
            axes.errorbar(x, mean, std, marker="o", capsize=3, color=colour, label=weights)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config.ranks, [str(r) for r in config.ranks])
        axes.set_xlabel("rank")
        axes.set_ylabel(f"{config.task}, validation score (percent)")
        axes.legend(title="updated projections", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("lora_rank", Config, main, __doc__))
