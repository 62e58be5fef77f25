"""What a run shows: a progress bar with loss and speed, and tables of results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Shown = Callable[[int, float, float], None]


@contextmanager
def bar(console: Console, title: str, steps: int) -> Generator[Shown]:
    """A bar to call with step, loss and tokens/s; where the output is no terminal, ten lines."""
    if not console.is_terminal:
        every = max(1, steps // 10)

        def line(step: int, loss: float, speed: float) -> None:
            if step % every == 0 or step == steps:
                console.print(
                    f"{title}: step {step}/{steps}  loss {loss:.4f}  {speed:,.0f} tokens/s"
                )

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss=float("nan"), speed=0.0)
        yield lambda step, loss, speed: progress.update(
            task, completed=step, loss=loss, speed=speed
        )


def result_table(
    title: str, rows: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int
) -> Table:
    """Methods down, metrics across; with several seeds `mean ± standard deviation`."""
    names = list(next(iter(rows.values())))
    table = Table(title=f"{title}, validation" + (f", {seeds} seeds" if seeds > 1 else ""))
    table.add_column("method")
    for name in names:
        table.add_column(name, justify="right")
    for method, of in rows.items():
        cells = [f"{of[n]['mean']:.4f}" for n in names]
        if seeds > 1:
            cells = [
                f"{c} ± {of[n]['std']:.4f}" if of[n]["std"] else c
                for c, n in zip(cells, names, strict=True)
            ]
        table.add_row(method, *cells)
    return table


def held_out_table(result: Mapping[str, Any]) -> Table:
    """The held-out loss before and after, and the answers' scores."""
    out = Table(title=f"{result['config']['task']}, held out")
    for name in ("loss before", "loss", "perplexity", *result["scores"]):
        out.add_column(name, justify="right")
    held = result["held_out"]
    cells = [f"{held['loss_before']:.4f}", f"{held['loss']:.4f}", f"{held['perplexity']:.2f}"]
    out.add_row(*cells, *(f"{x:.1f}" for x in result["scores"].values()))
    return out
