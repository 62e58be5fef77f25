"""What pre-training shows: a table, and losses against parameters and against steps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.plots import COLOURS, figure, made_on
from experiments.common.pretrain_sizes import FAMILIES

# What a loss is over, which differs: losses compare within a family.
PER = {
    "encoder": "masked token",
    "decoder": "next token",
    "encoder_decoder": "token of spans",
}
_MARKERS = "osD^v"


def table(result: Mapping[str, Any]) -> Table:
    """A model a row."""
    out = Table(title="pre-training, validation loss in nats")
    names = ("family", "size", "parameters", "steps", "tokens", "loss", "of a", "tokens/s")
    for name in names:
        words = name in ("family", "size", "of a")
        out.add_column(name, justify="left" if words else "right")
    for m in result["models"]:
        numbers = (f"{m['parameters']:,}", f"{m['steps']:,}", f"{m['tokens']:,}")
        loss = f"{m['validation'][str(m['steps'])]:.4f}"
        speed = f"{m['tokens_per_second']:,.0f}"
        out.add_row(m["family"], m["size"], *numbers, loss, PER[m["family"]], speed)
    return out


def draw(out: pathlib.Path, result: dict[str, Any], console: Console) -> None:
    """`pretrain`, loss against parameters, and `pretrain_steps`, loss against steps."""
    if not result["models"]:
        return
    families = [f for f in FAMILIES if any(m["family"] == f for m in result["models"])]
    of = {f: [m for m in result["models"] if m["family"] == f] for f in families}
    # The last model's: a folder may have models that other machines trained.
    last = result | {"machine": result["models"][-1]["machine"]}
    source = f"{result['data']['source']}; {made_on(last)}"
    with figure(out, "pretrain", source, console) as axes:
        if axes is not None:
            for colour, marker, (family, models) in zip(
                COLOURS, _MARKERS, of.items(), strict=False
            ):
                x = [m["parameters"] for m in models]
                y = [m["validation"][str(m["steps"])] for m in models]
                axes.plot(x, y, color=colour, marker=marker, label=_label(family))
            _logarithmic(axes, "parameters")
    with figure(out, "pretrain_steps", source, console, (8.0, 4.8)) as axes:
        if axes is not None:
            for colour, (family, models) in zip(COLOURS, of.items(), strict=False):
                for marker, model in zip(_MARKERS, models, strict=False):
                    # A logarithm has no place for step 0.
                    points = [(int(s), y) for s, y in model["validation"].items() if s != "0"]
                    name = f"{_label(family)}, {model['size']}"
                    shown = {"color": colour, "marker": marker, "label": name, "lw": 1}
                    axes.plot(*zip(*points, strict=True), **shown)
            _logarithmic(axes, "steps")


def _label(family: str) -> str:
    return f"{family.replace('_', '-')} ({PER[family]})"


def _logarithmic(axes: Any, name: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel("validation loss, nats")
    # A decade of losses would have one tick.
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, which="both")
