"""Figures: one style, a source line, PNG and SVG."""

from __future__ import annotations

import pathlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from experiments.common.report import device_name, model_title, runs_elsewhere

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


@contextmanager
def figure(
    out: pathlib.Path | None, name: str, source: str, console: Console, size: Any = (6.4, 4.2)
) -> Generator[Any]:
    """An axes to draw on; `out/name.png` and `out/name.svg` when the block ends.

    Without a folder, in a process that is not a job's first one, or where matplotlib is not
    installed, it yields None; the latter is told.
    """
    from sharding.cluster import is_main

    if out is None or not is_main():
        yield None
        return
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: it needs the extra, jpeft[plot]")
        yield None
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Fixed, so that equal results are equal files.
    style: dict[Any, Any] = {
        "svg.hashsalt": "jpeft",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        drawn, axes = pyplot.subplots(figsize=size, layout="constrained")
        yield axes
        drawn.supxlabel(source, fontsize=7, color="0.4", x=0.01, ha="left")
        drawn.savefig(out / f"{name}.png", dpi=150)
        drawn.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(drawn)
    console.print(f"plot: {out / name}.png, .svg")


def source_line(result: Mapping[str, Any]) -> str:
    """Where a figure's numbers come from, in one line."""
    config = result["config"]
    what = f"{model_title(config['model'])} on {config['task']}"
    return f"{what}, {seeds(config['seeds'])}; {made_on(result)}"


def made_on(result: Mapping[str, Any]) -> str:
    """The processor or device, JAX's version and the date."""
    machine = result["machine"]
    about = f"{device_name(machine)}, jax {result['versions']['jax']}, {machine['date']}"
    return about + runs_elsewhere(result)


def seeds(count: int) -> str:
    """So many seeds, in words."""
    return f"{count} seed" + ("s" if count > 1 else "")
