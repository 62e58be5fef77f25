"""One model's pre-training: steps, validation, exports at some steps, and going on after a cut."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common.loop import DivergedError, InterruptedRunError, Skips
from experiments.common.pretrain_steps import Pretrainer
from experiments.common.scale import on_host
from jpeft.precision import cast
from sharding import Checkpoints, fingerprint, stop_on_signals
from sharding.cluster import is_main

Log = Callable[[dict[str, Any]], None]
Export = Callable[[pathlib.Path, Any], None]


@dataclasses.dataclass
class Progress:
    """What was done: `seconds` of the `timed` steps, those that do not compile; `validation`, the
    loss by step; `labels`, how many it is over; `loss`, the mean of the last call's steps.
    """

    step: int = 0
    seconds: float = 0.0
    timed: int = 0
    loss: float = float("nan")
    labels: int = 0
    validation: dict[str, float] = dataclasses.field(default_factory=dict)


def default_marks(steps: int) -> tuple[int, ...]:
    """The steps whose models are kept: 0, 64, then four times as many each, and the last."""
    marks, at = [0], 64
    while at < steps:
        marks.append(at)
        at *= 4
    return (*marks, steps)


def calls(steps: int, most: int, marks: Sequence[int], begun: int = 0) -> list[int]:
    """How many steps each call makes, `most` where no mark comes before.

    Calls end at the multiples of `most` and at marks, wherever a run begins: few programs do.
    """
    ends = sorted({*range(0, steps, most), *(m for m in marks if m <= steps), steps})
    ends = [begun, *(e for e in ends if e > begun)]
    return [b - a for a, b in itertools.pairwise(ends)]


def step_name(step: int) -> str:
    """The name of the folder of a step's model."""
    return f"step_{step:06}"


def pretrain(
    trainer: Pretrainer,
    folder: pathlib.Path,
    marks: Sequence[int],
    *,
    export: Export,
    log: Log,
    resume: bool,
    call: int,
    save_every: int,
    rows: int,
) -> Progress:
    """Train to the schedule's end, with the model of every mark in `folder/step_...`.

    **Arguments:** `export(directory, params)` writes a model, of parameters in bf16; `log` is
    called after every call of the compiled program; `call`, its steps; `save_every`, steps between
    the states that a cut run goes on from; `rows`, of validation.

    **Raises:** `InterruptedRunError` after Ctrl-C or SIGTERM, when the running call is done and
    saved; `DivergedError`; `CheckpointError` for a state of another run.
    """
    total = trainer.schedule.steps
    tokens = trainer.rows * trainer.objective.window
    kept = folder / "checkpoint"
    base = fingerprint({"stream": trainer.stream})
    progress, state = Progress(), trainer.init()
    known: set[int] = set()
    with Checkpoints(kept, keep=1, base=base) as saved, stop_on_signals() as stopping:
        if resume and saved.latest() is not None:
            state, about = saved.restore(state)
            progress = Progress(**about)

        def marked() -> None:
            at = str(progress.step)
            if progress.step not in marks or at in progress.validation:
                return
            loss, progress.labels = trainer.held_out_loss(state, rows)
            progress.validation[at] = loss
            params = on_host(state.trainable)
            if is_main():
                export(folder / step_name(progress.step), cast(params, jnp.bfloat16))
            log({"step": progress.step, "validation": loss})

        marked()
        skips = Skips(total, progress.step, int(state.skipped))
        written = progress.step
        for count in calls(total, call, marks, progress.step):
            begun = time.perf_counter()
            state, losses = trainer.steps(state, count)
            found = np.asarray(losses)
            seconds = time.perf_counter() - begun
            progress.step += count
            if not np.isfinite(found).all():
                raise DivergedError(
                    f"the loss is not a number after step {progress.step}: try a lower --lr, or "
                    "--precision float32"
                )
            skips.seen(progress.step, int(state.skipped))
            progress.loss = float(found.mean())
            if count in known:  # the first call of each length compiles, and is no measure
                progress.seconds += seconds
                progress.timed += count
            known.add(count)
            log(
                {
                    "step": progress.step,
                    "loss": progress.loss,
                    "skipped": skips.total,
                    "tokens_per_second": speed(progress, tokens),
                }
            )
            marked()
            last = progress.step == total
            signal = 0 if last else stopping()
            if signal or (not last and progress.step - written >= save_every):
                saved.save(progress.step, state, dataclasses.asdict(progress))
                written = progress.step
            if signal:
                raise InterruptedRunError(signal)
    if is_main():
        params = on_host(state.trainable)
        export(folder / "model", cast(params, jnp.bfloat16))
        shutil.rmtree(kept, ignore_errors=True)
    return progress


def speed(progress: Progress, tokens: int) -> float:
    """Tokens a second, of text, in training alone; `tokens`, of a step."""
    return tokens * progress.timed / progress.seconds if progress.seconds else 0.0
