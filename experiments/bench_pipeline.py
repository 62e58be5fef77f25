"""Training on batches as the pipeline makes them, beside training on the same ones out of memory.

The pipeline shuffles, cuts, pads and places each batch while the step before it is at work. Both
train in one process, in turn; what is left between them is what the input costs. Without arguments:
this package's encoder on its sample.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.models import fetch_model
from experiments.common.pipeline import Batch, Batches
from experiments.common.report import describe_machine, versions, without_folders, write_json

if TYPE_CHECKING:
    from experiments.common.training import Trainer


@dataclasses.dataclass(frozen=True)
class Config(lora_glue.Config):
    """Options are those of `lora_glue`; a turn has `--max-steps` steps."""

    max_steps: int | None = 60
    """Steps of a turn."""
    rounds: int = 5
    """Turns of each."""
    dropout: bool = False
    """The model's own dropout in training."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    console = console or Console()
    lora_glue.check(config)
    if config.rounds < 1 or not config.max_steps or config.max_steps < 2:
        raise ValueError("--rounds is at least 1, and --max-steps at least 2")
    for name in ("resume", "tensorboard", "seeds"):
        if getattr(config, name) != getattr(Config(), name):
            raise ValueError(f"--{name} is of a training that is kept: here nothing is")
    ready(config.out, config.overwrite)
    directory = fetch_model(config.model, console)
    prepared = lora_glue.prepare(config, directory)
    model = lora_glue.build(config, directory, max(1, len(prepared.data.task.labels)), 0)
    trainer = lora_glue.trainer_of(config, model, 0, config.max_steps)
    batches = Batches(prepared.train, prepared.train_shapes, prepared.pad, 0)
    stored = _first(batches, config.max_steps)
    speeds: dict[str, list[float]] = {"pipeline": [], "memory": []}
    for i in range(config.rounds + 1):
        with console.status(f"turn {i} of {config.rounds}"):
            for name, source in (("pipeline", batches), ("memory", stored)):
                found = tokens_per_second(trainer, source)
                if i:  # the first round compiles
                    speeds[name].append(found)
    ratios = [a / b for a, b in zip(speeds["pipeline"], speeds["memory"], strict=True)]
    median = {name: statistics.median(x) for name, x in speeds.items()}
    result: dict[str, Any] = {
        "experiment": "bench_pipeline",
        "config": without_folders(config),
        "data": prepared.data.source,
        "tokens_per_second": median,
        "ratio": {"median": statistics.median(ratios), "all": ratios},
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(
        f"{median['pipeline']:,.0f} tokens/s with the pipeline, {median['memory']:,.0f} out of "
        f"memory: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        highlight=False,
    )
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def tokens_per_second(trainer: Trainer, batches: Batches | Iterable[Batch]) -> float:
    """Of a training by the loop that every experiment uses, from its first step's end on."""
    from experiments.common.loop import train

    ends: list[float] = []
    train(trainer, batches, None, log=lambda entry: ends.append(time.perf_counter()))
    counted = _first(batches, trainer.schedule.steps)[1:]
    return sum(int(b["attention_mask"].sum()) for b in counted) / (ends[-1] - ends[0])


def _first(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first batches, of a start of their own."""
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("bench_pipeline", Config, main, __doc__))
