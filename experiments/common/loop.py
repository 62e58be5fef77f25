"""The training loop that experiments share: progress, checkpoints, signals to stop."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np

from experiments.common.pipeline import Batch, Batches
from experiments.common.training import Trainer
from sharding import Checkpoints, fingerprint, stop_on_signals
from sharding.cluster import is_main

# So many steps in a row without a finite gradient, and training stops.
MOST_SKIPPED = 10

Log = Callable[[dict[str, Any]], None]


class DivergedError(RuntimeError):
    """The loss is no longer a number, or no gradient is."""


class InterruptedRunError(Exception):
    """A signal came, whose number is the argument; a checkpoint stands in the folder."""


@dataclasses.dataclass
class Skips:
    """Steps that changed nothing, since their gradient was not finite: the first one is told.

    **Attributes:** `steps`, of the run; `step`, the last one that was seen; `total`, how many were
    skipped up to it, and `row` of the last ones in a row.
    """

    steps: int
    step: int = 0
    total: int = 0
    row: int = 0

    def seen(self, step: int, total: int) -> None:
        """Of the steps up to `step`, `total` were skipped.

        **Raises:** `DivergedError` for `MOST_SKIPPED` in a row, or for all steps of a shorter run.
        """
        new = total - self.total
        if new and not self.total and is_main():
            print(
                f"the gradient is not finite by step {step}: such steps are skipped",
                file=sys.stderr,
            )
        self.row = self.row + new if new == step - self.step else 0
        self.step, self.total = step, total
        if self.row >= min(MOST_SKIPPED, self.steps):
            raise DivergedError(
                f"no gradient is finite from step {step - self.row + 1} to {step}: "
                "try a lower --lr, or --precision float32"
            )


@dataclasses.dataclass
class Progress:
    """What a loop has done: steps; seconds and tokens of the `timed` ones (those that do not
    compile); losses.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    timed: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """The mean time of a training step."""
        return self.seconds / self.timed if self.timed else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted, over the time of training steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    trainer: Trainer,
    batches: Batches | Iterable[Batch],
    folder: pathlib.Path | None,
    *,
    log: Log,
    resume: bool = False,
    save_every: int = 200,
) -> tuple[Any, Progress]:
    """Train to the schedule's end; the trained state, and what was done.

    Of several processes each makes its rows of every batch.

    **Arguments:** `batches`, without checkpoints any that the step can take; `folder`, where
    checkpoints are kept (None: nowhere); `resume`, start from the last one there; `log` is called
    with every step's `step`, `loss`, `skipped` (how many steps were, so far) and
    `tokens_per_second`.

    **Raises:** `InterruptedRunError` after Ctrl-C or SIGTERM, when the running step is done and
    saved; `DivergedError`; `CheckpointError` for checkpoints of another run; `ValueError` for fewer
    batches than steps.
    """
    if isinstance(batches, Batches):
        batches = batches.of(trainer.share(batches.shapes.batch))
    iterator: Any = iter(batches)
    state = trainer.init()
    progress = Progress()
    with (
        _checkpoints(trainer, folder) as saved,
        stop_on_signals() as stopping,
        ThreadPoolExecutor(1) as beside,
    ):
        if resume and saved is not None and saved.latest() is not None:
            state, about = saved.restore(state)
            iterator.set_state(about["data"])
            progress = Progress(**about["progress"])
        compiled: set[Any] = set()
        steps = trainer.schedule.steps
        skips = Skips(steps, progress.step, int(state.skipped))

        def made(number: int) -> Batch:
            try:
                return next(iterator)
            except StopIteration:
                raise ValueError(f"{number} batches for {steps} steps: give more") from None

        batch = made(progress.step) if progress.step < steps else None
        while batch is not None:
            at = iterator.get_state() if saved else None
            start = time.perf_counter()
            key = trainer.key(progress.step)
            # While the step is at work the next batch is made.
            more = progress.step + 1 < steps
            upcoming = beside.submit(made, progress.step + 1) if more else None
            state, metrics = trainer.step(state, trainer.frozen, batch, key)
            following = None if upcoming is None else upcoming.result()
            value = float(metrics["loss"])
            _record(progress, batch, value, time.perf_counter() - start, compiled)
            skips.seen(progress.step, int(state.skipped))
            log(
                {
                    "step": progress.step,
                    "loss": value,
                    "skipped": skips.total,
                    "tokens_per_second": progress.tokens_per_second,
                }
            )
            batch, last = following, progress.step == steps
            signal = 0 if last else stopping()
            if saved and (last or signal or progress.step % save_every == 0):
                about = {"progress": dataclasses.asdict(progress), "data": at}
                saved.save(progress.step, state, about)
            if signal:
                raise InterruptedRunError(signal)
    return state.trainable, progress


def _checkpoints(trainer: Trainer, folder: pathlib.Path | None) -> Any:
    if folder is None:
        return nullcontext()
    return Checkpoints(folder / "checkpoint", keep=2, base=fingerprint(trainer.frozen))


def _record(
    progress: Progress, batch: Batch, loss: float, seconds: float, compiled: set[Any]
) -> None:
    progress.step += 1
    if not np.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {progress.step}: try a lower --lr, or --precision float32"
        )
    progress.losses.append(loss)
    shapes = tuple(x.shape for x in batch.values())
    if shapes in compiled:
        progress.seconds += seconds
        progress.timed += 1
        progress.tokens += int(batch["attention_mask"].sum())
    compiled.add(shapes)  # the first step of each shape compiles, and is no measure
