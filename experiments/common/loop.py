"""The training loop that experiments share: progress, checkpoints, Ctrl-C."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.pipeline import Batch, Batches
from experiments.common.training import Trainer
from jpeft.files import names

Log = Callable[[dict[str, Any]], None]


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class InterruptedRunError(Exception):
    """Ctrl-C was pressed; a checkpoint stands in the folder."""


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
    batches: Batches,
    folder: pathlib.Path | None,
    *,
    log: Log,
    resume: bool = False,
    save_every: int = 200,
) -> tuple[Any, Progress]:
    """Train to the schedule's end; the trained state, and what was done.

    **Arguments:** `folder`, where checkpoints are kept (None: nowhere); `resume`, start from the
    last one there; `log` is called with every step's `step`, `loss` and `tokens_per_second`.

    **Raises:** `InterruptedRunError` after Ctrl-C, when the running step is done and saved;
    `DivergedError`.
    """
    iterator = iter(batches)
    state = trainer.init()
    progress = Progress()
    with _manager(folder) as manager:
        if resume and manager is not None and manager.latest_step() is not None:
            state, data = _restore(manager, state)
            iterator.set_state(data["data"])
            kept = ("step", "tokens", "seconds", "timed", "losses")
            progress = Progress(**{k: data[k] for k in kept})
        compiled: set[Any] = set()
        with _stop_on_interrupt() as stopped:
            while progress.step < trainer.schedule.steps:
                batch = next(iterator)
                start = time.perf_counter()
                key = trainer.key(progress.step)
                state, metrics = trainer.step(state, trainer.frozen, batch, key)
                value = float(metrics["loss"])
                _record(progress, batch, value, time.perf_counter() - start, compiled)
                log(
                    {
                        "step": progress.step,
                        "loss": value,
                        "tokens_per_second": progress.tokens_per_second,
                    }
                )
                last = progress.step == trainer.schedule.steps
                if manager and (last or stopped() or progress.step % save_every == 0):
                    _save(manager, progress, state, iterator.get_state())
                if stopped() and not last:
                    raise InterruptedRunError
    return state.trainable, progress


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


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the running step end; a second one stops at once."""
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        old = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread: there Ctrl-C is not ours
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, old)


@contextmanager
def _manager(folder: pathlib.Path | None) -> Iterator[Any]:
    if folder is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(folder.resolve() / "checkpoint", options=options)
    try:
        yield manager
    finally:
        manager.close()


def _save(manager: Any, progress: Progress, state: Any, data: Any) -> None:
    about = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "timed": progress.timed,
        "losses": progress.losses,
        "data": data,
    }
    arrays = ocp.args.StandardSave(names(state))  # type: ignore[call-arg]
    args = ocp.args.Composite(arrays=arrays, about=ocp.args.JsonSave(about))  # type: ignore
    if manager.latest_step() != progress.step:
        manager.save(progress.step, args=args)


def _restore(manager: Any, state: Any) -> tuple[Any, dict[str, Any]]:
    abstract = jax.eval_shape(lambda: names(state))
    args = ocp.args.Composite(
        arrays=ocp.args.StandardRestore(abstract),  # type: ignore[call-arg]
        about=ocp.args.JsonRestore(),  # type: ignore[call-arg]
    )
    found = manager.restore(manager.latest_step(), args=args)
    leaves = [found["arrays"][n] for n in names(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), found["about"]
