"""The cost of a step: subspaces beside full fine-tuning, a batch of many tasks beside one task's.

Everything runs in one process, in turn on one batch, and ratios are taken within each round. The
memory is what the compiled programs say.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.methods import RECIPES, Method, Sizes, called_with, make_room
from experiments.common.models import fetch_model, machine_layout
from experiments.common.options import at_least, one_or_more
from experiments.common.report import describe_machine, versions, write_json
from experiments.common.timing import ratio, timed_steps, turns


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "minilm"
    """`minilm`, a directory with a BERT, or a hub name."""
    batch: int = 32
    """Examples in the batch."""
    length: int = 64
    """Tokens in each."""
    training: tuple[Method, ...] = ("full", "lora", "subspace", "said")
    """Training steps; ratios are to the first."""
    plain: tuple[Method, ...] = ("full", "lora")
    """Those that on a CPU are timed a second time as the compiler has them: without
    `jpeft.cpu_products`, all activations kept."""
    mixed: tuple[Method, ...] = ("lora", "adapter", "ia3", "prompt", "prefix")
    """Methods whose batch of many tasks is run forward beside a single task's."""
    tasks: int = 8
    """Tasks in one batch."""
    rounds: int = 9
    """Turns of each."""
    out: pathlib.Path | None = None
    """Folder for `result.json`."""
    overwrite: bool = False
    """Throw away the result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    console = console or Console()
    one_or_more(config, "training")
    at_least(config, batch=1, length=1, tasks=1, rounds=1)
    ready(config.out, config.overwrite)
    steps = training(config, console)
    mixed = many_tasks(config, console)
    table = Table(title=f"training steps, batch {config.batch} x {config.length}")
    for name in ("method", "ms", "ratio", "MiB", "ratio of MiB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, r in steps.items():
        cells = (f"{r['ms']:.0f}", f"{r['ratio']:.2f}", f"{r['mib']:,.0f}")
        table.add_row(name, *cells, f"{r['memory_ratio']:.2f}")
    console.print(table)
    table = Table(title=f"forward, {config.tasks} tasks in one batch beside one task")
    for name in ("method", "one task, ms", f"{config.tasks} tasks, ms", "throughput ratio"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, r in mixed.items():
        table.add_row(name, f"{r['single_ms']:.0f}", f"{r['mixed_ms']:.0f}", f"{r['ratio']:.2f}")
    console.print(table)
    result = {
        "config": dataclasses.asdict(config) | {"out": None},
        "training": steps,
        "many_tasks": mixed,
        "machine": describe_machine(),
        "versions": versions(),
    }
    if config.out is not None:
        write_json(config.out / "result.json", result)
    return result


def trainer_of(config: Config, method: Method, console: Console, plain: bool = False) -> Any:
    """The compiled trainer of a method, without dropout, on a model with a head for two classes.

    **Arguments:** `plain`, without what makes a step faster on a CPU.
    """
    import functools

    import jax

    from experiments.common.training import Schedule, Trainer
    from jpeft.hf import load_sequence_classifier

    directory = fetch_model(config.model, console)
    layout: dict[str, Any] = machine_layout() | ({"remat": False} if plain else {})
    model, _ = load_sequence_classifier(
        directory, 2, key=jax.random.key(0), pooling="mean", **layout
    )
    apply, params = jpeft.functional(model)
    recipe, sizes = RECIPES[method], Sizes()
    first = model.config.vocab_size if method == "prompt" else 0
    length = recipe.room(sizes)
    room = functools.partial(make_room, length=length, first=first)
    schedule = Schedule(recipe.rate, 1000)
    transform = recipe.transform(sizes)
    return Trainer(
        apply,
        params,
        transform,
        schedule,
        0,
        False,
        room,
        products=not plain,
        options=called_with(method, length),
    )


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """Random tokens, no padding."""
    rng = np.random.default_rng(0)
    shape = (config.batch, config.length)
    return {
        "input_ids": rng.integers(1996, 20_000, shape, dtype=np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "labels": rng.integers(0, 2, config.batch).astype(np.float32),
        "valid": np.ones(config.batch, np.float32),
    }


def training(config: Config, console: Console) -> dict[str, Any]:
    """Training steps of every method."""
    import jax

    trainers: dict[str, Any] = {m: trainer_of(config, m, console) for m in config.training}
    for method in config.plain if jax.default_backend() == "cpu" else ():
        trainers[f"{method}, plain"] = trainer_of(config, method, console, plain=True)
    return timed_steps(trainers, batch_of(config), config.rounds)


def many_tasks(config: Config, console: Console) -> dict[str, Any]:
    """The forward pass of a batch of many tasks, and of one task's batch."""
    import jax

    from experiments.common.training import compiler_options

    batch = batch_of(config)
    task = np.arange(config.batch, dtype=np.int32) % config.tasks
    out: dict[str, Any] = {}
    for method in config.mixed:
        trainer = trainer_of(config, method, console)
        state = trainer.init().trainable
        stacked = jpeft.stack(
            [jax.tree.map(lambda x, k=k: x + 0.01 * k, state) for k in range(config.tasks)]
        )

        def forward(
            frozen: Any, stacked: Any, batch: Any, task: Any, trainer: Any = trainer
        ) -> Any:
            rewritten = trainer.rewritten(frozen, stacked, task=task)
            return trainer.forward(rewritten, batch, None)

        mixed = jax.jit(forward, compiler_options=compiler_options())
        runs: dict[str, Callable[[], Any]] = {
            "single": lambda t=trainer, s=state: t.outputs(t.frozen, s, batch).block_until_ready(),
            "mixed": lambda t=trainer, m=mixed, s=stacked: m(
                t.frozen, s, batch, task
            ).block_until_ready(),
        }
        times = turns(runs, config.rounds)
        out[method] = {
            "single_ms": statistics.median(times["single"]),
            "mixed_ms": statistics.median(times["mixed"]),
            "ratio": ratio(times["single"], times["mixed"]),
        }
    return out


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("bench_steps", Config, main, __doc__))
