"""LoRA+: the loss against steps for several ratios of the learning rates of B and A.

Without arguments: ratios 1, 4 and 16 on the sample of this package.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import runtime
from experiments.common.command import command
from experiments.common.loss_curves import rounded, steps_to, windows
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

    ratios: tuple[float, ...] = (1.0, 4.0, 16.0)
    """How many times as fast B learns; 1 is plain AdamW at the rate of A."""
    lr: float | None = 2e-4
    """The peak learning rate of the A matrices."""
    window: int = 20
    """Steps that a point of the curves is the mean of."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plot."""
    console = console or Console()
    refuse(config, lora_plus="--ratios", method="lora_glue")
    one_or_more(config, "ratios")
    at_least(config, window=1)
    if 1.0 not in config.ratios:
        raise ValueError("--ratios: 1 is what the others are held against")
    changes = {f"ratio_{ratio:g}": {"lora_plus": ratio} for ratio in config.ratios}
    runs = runs_of(config, changes)
    begin(config, runs, console, free=("ratios", "window"), window=config.window)
    results = sweep(runs, console, processes=config.processes)
    rows: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for ratio in config.ratios:
        result = results[f"ratio_{ratio:g}"]
        metric, score = metric_of(result, "lora")
        means = windows(result, config.window)
        curve = curves[f"{ratio:g}"] = means.mean(0)
        rows[f"{ratio:g}"] = {
            "metric": metric,
            "score": score,
            "curve": rounded(curve),
            "curves": [rounded(x) for x in means],
            "last_loss": float(curve[-1]),
        }
    for ratio, curve in curves.items():
        steps = steps_to(curve, curves["1"][-1], config.window)
        reached = steps <= len(curve) * config.window
        rows[ratio]["steps_to_plain_loss"] = steps if reached else None
    result = write_result(config, results, rows=rows)
    console.print(table(rows))
    draw(config, result, rows, console)
    return result


def table(rows: dict[str, Any]) -> Table:
    """Ratios down."""
    metric = next(iter(rows.values()))["metric"]
    out = Table(title="LoRA+ by ratio")
    for name in ("ratio", f"validation {metric}", "last loss", "steps to ratio 1's last loss"):
        out.add_column(name, justify="right")
    for ratio, r in rows.items():
        steps = r["steps_to_plain_loss"]
        cells = (f"{r['score']['mean']:.4f}", f"{r['last_loss']:.4f}")
        out.add_row(ratio, *cells, "not reached" if steps is None else str(steps))
    return out


def draw(config: Config, result: dict[str, Any], rows: dict[str, Any], console: Console) -> None:
    """The curves."""
    with figure(config.out, "lora_plus", source_line(result), console) as axes:
        if axes is None:
            return
        for i, (ratio, r) in enumerate(rows.items()):
            x = [(k + 0.5) * config.window for k in range(len(r["curve"]))]
            axes.plot(x, r["curve"], color=COLOURS[i % 7], label=ratio, linewidth=1.2)
        axes.set_xlabel("training step")
        axes.set_ylabel(f"training loss (mean of {config.window} steps)")
        axes.legend(title="rate of B / rate of A", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("lora_plus", Config, main, __doc__))
