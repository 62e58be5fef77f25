"""QLoRA: one adapter on a base in bf16, 8 and 4 bits: score, memory and time of a step.

Without arguments: on the sample of this package. `--report-65b` prints what one device holds of a
training step of Llama-65B, from the step compiled for a TPU or GPU that need not be there.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from experiments import lora_glue
from experiments.common import qlora_account, runtime
from experiments.common.command import command, ready
from experiments.common.methods import LINEAR
from experiments.common.models import fetch_model
from experiments.common.numbers import Quantised
from experiments.common.options import one_or_more
from experiments.common.pipeline import Batches
from experiments.common.plots import COLOURS, figure, source_line
from experiments.common.report import COMPILERS, describe_machine, versions, write_json
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

ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run; LoRA is on every linear layer."""

    targets: tuple[str, ...] = (LINEAR,)
    """LoRA's targets: regular expressions on parameter paths."""
    formats: tuple[Quantised, ...] = get_args(Quantised)
    """What the base's linear layers are kept in."""
    report_65b: bool = False
    """Print the memory of Llama-65B's and Llama-3-8B's QLoRA steps instead, rank 64, 1 x 512."""
    topology: str = qlora_account.TOPOLOGY
    """With --report-65b: one device of this is compiled for, such as a6000:1x1, a GPU of 48 GB."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    if config.report_65b:
        return report(config, console)
    if config.topology != qlora_account.TOPOLOGY:
        raise ValueError(
            "--topology is of --report-65b: training runs on the devices that are here"
        )
    refuse(config, quantize="--formats")
    one_or_more(config, "formats")
    runs = runs_of(config, {f: {"quantize": f} for f in config.formats})
    begin(config, runs, console, free=("formats",))
    results = sweep(runs, console, processes=config.processes)
    costs = step_costs(config, console)
    rows: dict[str, dict[str, Any]] = {}
    for name in config.formats:
        metric, score = metric_of(results[name], config.method)
        rows[name] = {"metric": metric, **score, **costs[name]}
    result = write_result(config, results, rows=rows)
    console.print(table(rows, config.seeds))
    draw(config, result, rows, console)
    return result


def step_costs(config: Config, console: Console) -> dict[str, dict[str, float]]:
    """Each base's bytes, and its step's `step_ms` and `memory_mib`: in turn on one batch."""
    import jax

    directory = fetch_model(config.model, console)
    prepared = lora_glue.prepare(config, directory)
    model = lora_glue.build(config, directory, max(1, len(prepared.data.task.labels)), 0)
    trainers = {
        name: lora_glue.trainer_of(dataclasses.replace(config, quantize=name), model, 0, 1000)
        for name in config.formats
    }
    batches = Batches(prepared.train, prepared.train_shapes, prepared.pad, 0)
    costs = timed_steps(trainers, next(iter(batches)), ROUNDS)
    return {
        name: {
            "base_mib": sum(x.nbytes for x in jax.tree.leaves(trainers[name].frozen)) / 2**20,
            "step_ms": c["ms"],
            "memory_mib": c["mib"],
        }
        for name, c in costs.items()
    }


def table(rows: dict[str, dict[str, Any]], seeds: int) -> Table:
    """A base a row."""
    out = Table(title="LoRA on every linear layer" + (f", {seeds} seeds" if seeds > 1 else ""))
    metric = next(iter(rows.values()))["metric"]
    for name in ("base", metric, "MiB of the base", "MiB a step", "ms a step"):
        out.add_column(name, justify="left" if name == "base" else "right")
    for name, r in rows.items():
        score = f"{r['mean']:.4f}" + (f" ± {r['std']:.4f}" if seeds > 1 else "")
        cells = (f"{r['base_mib']:,.1f}", f"{r['memory_mib']:,.1f}", f"{r['step_ms']:.0f}")
        out.add_row(name, score, *cells)
    return out


def draw(
    config: Config, result: dict[str, Any], rows: dict[str, dict[str, Any]], console: Console
) -> None:
    """Score against the base's size."""
    with figure(config.out, "qlora", source_line(result), console) as axes:
        if axes is None:
            return
        for colour, (name, r) in zip(COLOURS, rows.items(), strict=False):
            axes.errorbar(
                r["base_mib"], r["mean"], r["std"], marker="o", capsize=3, color=colour, label=name
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("frozen parameters (MiB)")
        axes.set_ylabel(f"{config.task}, validation {next(iter(rows.values()))['metric']}")
        axes.legend(title="linear layers in", frameon=False)
        axes.grid(alpha=0.3)


def report(config: Config, console: Console) -> dict[str, Any]:
    """Print and write the account of large models' steps."""
    ready(config.out, config.overwrite)
    rows = qlora_account.accounts(console, config.topology)
    result = {
        "config": {"report_65b": True, "topology": config.topology},
        "topology": config.topology,
        "rows": rows,
        "machine": describe_machine(),
        "versions": versions(*COMPILERS),
    }
    for model in dict.fromkeys(r["model"] for r in rows):
        console.print(qlora_account.table([r for r in rows if r["model"] == model]))
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


if __name__ == "__main__":
    if "--report-65b" in sys.argv:
        from sharding.tpus import alone

        with alone():
            sys.exit(command("qlora", Config, main, __doc__))
    runtime.restart_tuned()
    sys.exit(command("qlora", Config, main, __doc__))
