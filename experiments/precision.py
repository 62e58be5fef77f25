"""Full fine-tuning in four precisions: the loss of each, and how many numbers a step moves.

fp32; bf16 with fp32 masters (two copies of the weights); bf16 rounded at random; and bf16 alone,
whose numbers are too far apart for small updates. Without arguments: this package's encoder on the
sample of this package, 200 steps.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from experiments import lora_glue
from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.console import bar
from experiments.common.methods import RECIPES, Sizes
from experiments.common.metrics import evaluate
from experiments.common.models import fetch_model
from experiments.common.options import at_least
from experiments.common.pipeline import Batches
from experiments.common.plots import COLOURS, figure, made_on
from experiments.common.report import describe_machine, versions, write_json

if TYPE_CHECKING:
    from experiments.common.scale import Scale

# What a run is called, and what it keeps: the loss is compared with the first one's.
RUNS = ("float32", "mixed", "stochastic", "bfloat16 alone")
LAST, EVERY = 50, 10


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    task: lora_glue.TaskName = "sample"
    """GLUE's task, or the sample of this package."""
    data: pathlib.Path | None = None
    """Folder with the task's files."""
    model: str = "novels"
    """As in `lora_glue`: `novels`, `minilm`, a directory or a name on the hub."""
    steps: int = 200
    """Of each run."""
    batch: int = 32
    """Examples a step."""
    length: int = 128
    """Tokens an example is cut to."""
    lr: float = 2e-5
    """The learning rate, after a warm-up; it falls to zero."""
    seed: int = 0
    """Of the head, the order of the data and the rounding."""
    out: pathlib.Path | None = None
    """Folder for result.json and the plot."""
    overwrite: bool = False
    """Write over a result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Train in each precision, print and write."""
    console = console or Console()
    at_least(config, steps=1, batch=1, length=1)
    ready(config.out, config.overwrite)
    directory = fetch_model(config.model, console)
    result: dict[str, Any] = {
        "config": dataclasses.asdict(config) | {"out": None, "overwrite": False, "data": None},
        "rows": {name: run(config, name, directory, console) for name in RUNS},
    }
    whole = result["rows"]["float32"]["loss"]
    for row in result["rows"].values():
        row["over_float32"] = row["loss"] / whole
    result |= {"machine": describe_machine(), "versions": versions()}
    console.print(table(config, result))
    draw(config, result, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def scale_of(name: str) -> Scale:
    """The precision of a run."""
    from experiments.common.scale import Scale

    @dataclasses.dataclass(frozen=True)
    class Alone(Scale):
        """bf16 parameters that the optimiser adds to as they are."""

        @property
        def kept(self) -> Any:
            """bf16."""
            return Scale(precision="mixed").kept

    return Alone(precision="bfloat16") if name == "bfloat16 alone" else Scale(precision=name)  # type: ignore[arg-type]


def run(config: Config, name: str, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    """One precision: `losses`, `loss` (the mean of the last steps), validation's `scores`, and
    `moved`, the share of the optimiser's numbers that a step changes: parameters, or masters.
    """
    import jax
    import jax.numpy as jnp

    from experiments.common.training import Schedule, Trainer

    scale = scale_of(name)
    glue = lora_glue.Config(
        task=config.task,
        data=config.data,
        method="full",
        batch=config.batch,
        length=config.length,
        precision=scale.precision,
    )
    prepared = lora_glue.prepare(glue, directory)
    task = prepared.data.task
    model = lora_glue.build(glue, directory, max(1, len(task.labels)), config.seed)
    apply, params = jpeft.functional(model)
    schedule = Schedule(config.lr, config.steps)
    transform = RECIPES["full"].transform(Sizes())
    trainer = Trainer(apply, params, transform, schedule, config.seed, False, scale=scale)

    def numbers(state: Any) -> Any:
        return getattr(state.optimiser, "masters", state.trainable)

    @jax.jit
    def moved(before: Any, after: Any) -> Any:
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return jnp.stack([jnp.mean(a != b) * a.size for a, b in pairs]).sum()

    count = sum(x.size for x in jax.tree.leaves(params))
    state, losses, shares = trainer.init(), list[float](), list[float]()
    begun, seen = time.perf_counter(), 0
    batches = iter(Batches(prepared.train, prepared.train_shapes, prepared.pad, config.seed))
    with bar(console, name, config.steps) as shown:
        for i in range(config.steps):
            before = jax.tree.map(jnp.copy, numbers(state)) if i % EVERY == 0 else None
            batch = next(batches)
            state, metrics = trainer.step(state, trainer.frozen, batch, trainer.key(i))
            losses.append(float(metrics["loss"]))
            if before is not None and i:  # the rate of the first step is zero
                shares.append(float(moved(before, numbers(state))) / count)
            seen += int(batch["attention_mask"].sum())
            shown(i + 1, losses[-1], seen / (time.perf_counter() - begun))
    outputs = trainer.predict(
        state.trainable, prepared.validation, prepared.validation_shapes, prepared.pad
    )
    return {
        "loss": float(np.mean(losses[-LAST:])),
        "scores": evaluate(task.metrics, outputs, prepared.labels),
        "moved": float(np.mean(shares)) if shares else None,
        "losses": [round(x, 5) for x in losses],
    }


def table(config: Config, result: dict[str, Any]) -> Table:
    """A precision a row."""
    out = Table(title=f"{config.task}, {config.steps} steps of full fine-tuning")
    score = next(iter(result["rows"]["float32"]["scores"]))
    for name in ("precision", f"loss, last {LAST} steps", "over float32's", score, "moved a step"):
        out.add_column(name, justify="left" if name == "precision" else "right")
    for name, row in result["rows"].items():
        moved = "" if row["moved"] is None else f"{100 * row['moved']:.1f}%"
        cells = (f"{row['loss']:.4f}", f"{row['over_float32']:.3f}")
        out.add_row(name, *cells, f"{row['scores'][score]:.4f}", moved)
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Losses against steps, as running means."""
    name = pathlib.Path(config.model).name
    source = f"{name} on {config.task}, rate {config.lr:g}; {made_on(result)}"
    with figure(config.out, "precision", source, console) as axes:
        if axes is None:
            return
        width = max(1, config.steps // 10)
        for colour, style, (name, row) in zip(
            COLOURS, ("-", "--", ":", "-"), result["rows"].items(), strict=False
        ):
            mean = np.convolve(row["losses"], np.ones(width) / width, "valid")
            x = np.arange(width, width + len(mean))
            axes.plot(x, mean, style, color=colour, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(f"training loss, nats, mean of {width} steps")
        axes.legend(title="precision", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("precision", Config, main, __doc__))
