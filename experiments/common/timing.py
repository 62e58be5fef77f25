"""Steps timed side by side: in turn, in one process, ratios within each round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.common.pipeline import Batch
    from experiments.common.training import Trainer


def turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(a: list[float], b: list[float]) -> float:
    """The median of `a / b` within rounds."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def timed_steps(
    trainers: Mapping[str, Trainer], batch: Batch, rounds: int
) -> dict[str, dict[str, float]]:
    """Training steps on one batch: `ms` (the median) and `mib` (the compiled program's arguments
    and temporaries), with `ratio` and `memory_ratio` to the first trainer's.
    """
    memory = {name: sum(t.step_memory(batch).values()) for name, t in trainers.items()}
    times = turns({name: _stepper(t, batch) for name, t in trainers.items()}, rounds)
    first = next(iter(trainers))
    return {
        name: {
            "ms": statistics.median(times[name]),
            "ratio": ratio(times[name], times[first]),
            "mib": memory[name],
            "memory_ratio": memory[name] / memory[first],
        }
        for name in trainers
    }


def _stepper(trainer: Trainer, batch: Batch) -> Callable[[], Any]:
    held = [trainer.init()]

    def run() -> None:
        held[0], metrics = trainer.step(held[0], trainer.frozen, batch, trainer.key(0))
        float(metrics["loss"])

    return run
