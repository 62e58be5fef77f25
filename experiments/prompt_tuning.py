"""Prompt tuning: lengths and starts, beside full fine-tuning; then all prompts in one batch.

Without arguments: lengths 5 and 20 on the sample of this package.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command
from experiments.common.methods import PromptStart
from experiments.common.models import fetch_model
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


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run."""

    lengths: tuple[int, ...] = (5, 20)
    """Virtual tokens; the paper's are 1, 5, 20, 100 and 150."""
    starts: tuple[PromptStart, ...] = ("uniform", "vocabulary")
    """How prompts start: drawn words' embeddings, or uniform in [-0.5, 0.5]."""
    full_epochs: int | None = None
    """Epochs of full fine-tuning; without it as many as the prompts'."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, method="lora_glue", prompt="--lengths", prompt_start="--starts")
    one_or_more(config, "lengths", "starts")
    at_least(config, full_epochs=1)
    full = {"method": "full", "epochs": config.full_epochs or config.epochs, "lr": None}
    changes: dict[str, dict[str, Any]] = {"full": full, "head": {"method": "head", "lr": None}}
    for start in config.starts:
        for n in config.lengths:
            changes[f"{start}_{n}"] = {"method": "prompt", "prompt": n, "prompt_start": start}
    begin(config, runs_of(config, changes), console, free=("lengths", "starts"))
    with tempfile.TemporaryDirectory() as scratch:
        # The trained prompts are read again: without a folder they get one until then.
        out = config.out or pathlib.Path(scratch)
        runs = runs_of(dataclasses.replace(config, out=out), changes)
        results = sweep(runs, console, processes=config.processes)
        longest = [runs[f"{start}_{max(config.lengths)}"] for start in config.starts]
        together = mixed(longest, console) if len(longest) > 1 else None
    scores = {
        start: {str(n): metric_of(results[f"{start}_{n}"], "prompt")[1] for n in config.lengths}
        for start in config.starts
    }
    metric, whole = metric_of(results["full"], "full")
    result = write_result(
        config,
        results,
        metric=metric,
        scores=scores,
        full=whole,
        head=metric_of(results["head"], "head")[1],
        one_batch=together,
    )
    console.print(table(config, result))
    if result["one_batch"]:
        b = result["one_batch"]
        console.print(
            f"{b['tasks']} prompts in one batch: outputs differ from each prompt alone by at most "
            f"{b['largest_difference']:.1e}; {b['throughput_ratio']:.2f} of a single prompt's speed"
        )
    else:
        console.print("prompts in one batch: not measured; it takes two starts")
    draw(config, result, console)
    return result


def mixed(runs: list[lora_glue.Config], console: Console) -> dict[str, Any]:
    """What `one_batch` says of several runs' prompts, as their first seeds have saved them."""
    first = runs[0]
    directory = fetch_model(first.model, console)
    prepared = lora_glue.prepare(first, directory)
    model = lora_glue.build(first, directory, max(1, len(prepared.data.task.labels)), 0)
    trainer = lora_glue.trainer_of(first, model, 0, 1)
    like = trainer.init().trainable

    def trained(run: lora_glue.Config) -> Any:
        assert run.out is not None  # every run has a folder here
        state = jpeft.load(run.out / "seed0" / "adapter.safetensors", like)
        # On a mesh they stand where training has them.
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)

    return one_batch(trainer, [trained(run) for run in runs], prepared)


def one_batch(trainer: Any, states: list[Any], prepared: lora_glue.Prepared) -> dict[str, Any]:
    """Validation with every example under another prompt, against each prompt alone."""
    from experiments.common.pipeline import in_order

    examples = prepared.validation
    batches = list(in_order(examples, prepared.validation_shapes, prepared.pad))
    stacked = jpeft.stack(states)

    @jax.jit
    def run(frozen: Any, stacked: Any, batch: Any, task: Any) -> Any:
        rewritten = trainer.rewritten(frozen, stacked, task=task)
        return trainer.forward(rewritten, batch, None)

    worst, seconds = 0.0, {"mixed": 0.0, "single": 0.0}
    for numbers, batch in batches:
        task = np.arange(batch["labels"].shape[0], dtype=np.int32) % len(states)
        alone = [np.asarray(trainer.outputs(trainer.frozen, s, batch)) for s in states]
        want = np.stack(alone)[task, np.arange(len(task))]
        got = np.asarray(run(trainer.frozen, stacked, batch, task))
        worst = max(worst, float(np.abs(got - want)[: len(numbers)].max()))
        for _ in range(3):  # both are compiled by now
            start = time.perf_counter()
            np.asarray(run(trainer.frozen, stacked, batch, task))
            middle = time.perf_counter()
            np.asarray(trainer.outputs(trainer.frozen, states[0], batch))
            seconds["mixed"] += middle - start
            seconds["single"] += time.perf_counter() - middle
    return {
        "tasks": len(states),
        "largest_difference": worst,
        "throughput_ratio": seconds["single"] / seconds["mixed"],
    }


def table(config: Config, result: dict[str, Any]) -> Table:
    """Lengths down, starts across."""
    out = Table(title=f"{config.task}, validation {result['metric']}")
    out.add_column("length", justify="right")
    for start in config.starts:
        out.add_column(start, justify="right")
    for n in config.lengths:
        out.add_row(str(n), *(f"{result['scores'][s][str(n)]['mean']:.4f}" for s in config.starts))
    out.add_section()
    for name in ("head", "full"):
        out.add_row(name, *[f"{result[name]['mean']:.4f}"] * len(config.starts))
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Score against length."""
    with figure(config.out, "prompt_tuning", source_line(result), console) as axes:
        if axes is None:
            return
        for colour, (start, by) in zip(COLOURS, result["scores"].items(), strict=False):
            mean, std = ([v[k] for v in by.values()] for k in ("mean", "std"))
            x = [int(n) for n in by]
            axes.errorbar(x, mean, std, marker="o", capsize=3, color=colour, label=start)
        for name, words in (("full", "full fine-tuning"), ("head", "head alone")):
            y = result[name]["mean"]
            axes.axhline(y, color="0.4", linestyle="-" if name == "full" else "--", linewidth=1)
            axes.annotate(words, (min(config.lengths), y), va="bottom", fontsize=8, color="0.3")
        axes.set_xscale("log")
        axes.set_xticks(config.lengths, [str(n) for n in config.lengths])
        axes.set_xlabel("virtual tokens (log scale)")
        axes.set_ylabel(f"{config.task}, validation {result['metric']}")
        axes.legend(title="start", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("prompt_tuning", Config, main, __doc__))
