"""The score at every rank from one DyLoRA run, beside LoRA trained at each rank and LoRA cut short.

Without arguments: ranks up to 4 on the sample of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

import jpeft
from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command
from experiments.common.methods import HEAD
from experiments.common.metrics import evaluate
from experiments.common.plots import COLOURS, figure, source_line
from experiments.common.report import mean_and_deviation
from experiments.common.sweep import (
    SweepConfig,
    begin,
    metric_of,
    refuse,
    runs_of,
    sweep,
    write_result,
)

KINDS = ("DyLoRA, one run", "LoRA, one run a rank", "LoRA, cut to the rank")


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`; `--rank` is the largest, and alpha the same at each."""

    rank: int = 4
    """The largest rank."""
    ranks: tuple[int, ...] = ()
    """The ranks at which LoRA is trained and all are evaluated; without it 1 to --rank."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, method="lora_glue")
    ranks = config.ranks or tuple(range(1, config.rank + 1))
    if config.rank not in ranks or not all(1 <= r <= config.rank for r in ranks):
        raise ValueError(f"--ranks are 1 to {config.rank}, that one among them")
    changes: dict[str, dict[str, Any]] = {"dylora": {"method": "dylora"}}
    changes |= {f"lora_r{r}": {"method": "lora", "rank": r} for r in ranks}

    runs = runs_of(config, changes)
    begin(config, runs, console)

    def more(name: str) -> lora_glue.More | None:
        if name not in ("dylora", f"lora_r{config.rank}"):
            return None
        return functools.partial(at_ranks, ranks=ranks)

    results = sweep(runs, console, more, processes=config.processes)
    metric, _ = metric_of(results["dylora"], "dylora")

    def by_rank(name: str) -> dict[str, dict[str, float]]:
        seeds = results[name]["seeds"]
        return {
            str(r): mean_and_deviation([s["by_rank"][str(r)][metric] for s in seeds]) for r in ranks
        }

    apart = {str(r): metric_of(results[f"lora_r{r}"], "lora")[1] for r in ranks}
    scores = dict(
        zip(KINDS, (by_rank("dylora"), apart, by_rank(f"lora_r{config.rank}")), strict=True)
    )
    # Of all steps: of a run that was cut and went on the clock has seen the last part alone.
    trained = {
        n: sum(s["steps"] * s["step_seconds"] for s in r["seeds"]) for n, r in results.items()
    }
    seconds = {
        "dylora": trained["dylora"],
        "lora at every rank": sum(trained[f"lora_r{r}"] for r in ranks),
    }
    result = write_result(config, results, metric=metric, scores=scores, seconds=seconds)
    console.print(table(config, result))
    if seconds["dylora"]:  # the first step of each shape is not timed
        times = seconds["lora at every rank"] / seconds["dylora"]
        console.print(f"all ranks by LoRA took {times:.1f} times as long as the one DyLoRA run")
    draw(config, result, console)
    return result


def at_ranks(
    trainer: Any, state: Any, prepared: lora_glue.Prepared, ranks: tuple[int, ...]
) -> dict[str, Any]:
    """The scores of a trained state at every rank."""
    return {"by_rank": {str(r): at_rank(trainer, state, prepared, r) for r in ranks}}


def at_rank(trainer: Any, state: Any, prepared: lora_glue.Prepared, rank: int) -> dict[str, float]:
    """The scores of a trained state (of a head and a LoRA, or DyLoRA) cut to a rank."""
    head, factors = state
    _, lora = trainer.transform.transforms
    if isinstance(lora, jpeft.DyLoRA):
        small, cut = lora.at(factors, rank)
    else:
        # The scale stays what it was in training: alpha goes down with the rank.
        small = dataclasses.replace(lora, rank=rank, alpha=lora.alpha * rank / lora.rank)
        cut = {p: f.first(rank) for p, f in factors.items()}
    trainer = dataclasses.replace(trainer, transform=jpeft.chain(HEAD, small))
    outputs = trainer.predict(
        (head, cut), prepared.validation, prepared.validation_shapes, prepared.pad
    )
    return evaluate(prepared.data.task.metrics, outputs, prepared.labels)


def table(config: Config, result: dict[str, Any]) -> Table:
    """Ranks down."""
    out = Table(title=f"{config.task}, validation {result['metric']}")
    out.add_column("rank", justify="right")
    for kind in KINDS:
        out.add_column(kind, justify="right")
    for rank in result["scores"][KINDS[0]]:
        out.add_row(rank, *(f"{result['scores'][k][rank]['mean']:.4f}" for k in KINDS))
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Score against rank."""
    with figure(config.out, "dylora", source_line(result), console) as axes:
        if axes is None:
            return
        x = [int(r) for r in result["scores"][KINDS[0]]]
        for colour, (kind, by) in zip(COLOURS, result["scores"].items(), strict=False):
            mean, std = ([v[k] for v in by.values()] for k in ("mean", "std"))
            axes.errorbar(x, mean, std, marker="o", capsize=3, color=colour, label=kind)
        axes.set_xticks(x)
        axes.set_xlabel("rank at which the model is used")
        axes.set_ylabel(f"{config.task}, validation {result['metric']}")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("dylora", Config, main, __doc__))
