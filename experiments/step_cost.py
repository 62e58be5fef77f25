"""The time of a training step against the number of layers, the sequence, the batch and the rank.

A decoder with random weights, of which one of the four is changed at a time. Beside the times stand
the floating point operations of the step's matrix products, and beside the slope of the one that of
the other: by how many doublings the cost grows when what is changed doubles.

Without arguments: a small decoder, LoRA on query and value.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.numbers import Precision
from experiments.common.plots import COLOURS, figure, made_on
from experiments.common.report import describe_machine, versions, write_json

if TYPE_CHECKING:
    from experiments.common.accounts import Case

NAMES = {
    "layers": "layers",
    "sequence": "tokens in a row",
    "batch": "rows in a batch",
    "rank": "rank of LoRA",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The step in the middle, and what each of the four is changed to."""

    method: Literal["lora", "full"] = "lora"
    """What is trained: LoRA on query and value, or everything."""
    width: int = 256
    """The decoder's hidden size; its heads are 64 wide, its MLP 2.75 times as wide."""
    vocabulary: int = 1024
    """Rows of its embeddings."""
    precision: Precision = "float32"
    """As finetune's."""
    layers: int = 4
    """In the middle."""
    sequence: int = 128
    """In the middle: tokens in a row."""
    batch: int = 8
    """In the middle: rows."""
    rank: int = 8
    """In the middle."""
    many_layers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of layers."""
    sequences: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    """Tokens in a row."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Rows."""
    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Of LoRA."""
    rounds: int = 7
    """Turns of each step."""
    out: pathlib.Path | None = None
    """Folder for `result.json` and the plots."""
    overwrite: bool = False
    """Throw away the result that --out holds."""

    def values(self) -> dict[str, tuple[int, ...]]:
        """What each of the four is changed to, in order."""
        lists = (self.many_layers, self.sequences, self.batches, self.ranks)
        every = dict(zip(NAMES, (tuple(sorted(set(x))) for x in lists), strict=True))
        if self.method == "full":
            del every["rank"]
        return every


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure, print and write.

    **Raises:** `ValueError` for what makes no slope.
    """
    console = console or Console()
    every = config.values()
    for name, values in every.items():
        if len(values) < 2 or values[0] < 1:
            raise ValueError(f"a slope takes two or more {NAMES[name]}, of 1 and up; got {values}")
    if config.width % 64 or config.rounds < 1:
        raise ValueError("--width is a multiple of 64, and --rounds at least 1")
    ready(config.out, config.overwrite)
    rows = {name: axis(config, name, values, console) for name, values in every.items()}
    result = {
        "config": dataclasses.asdict(config) | {"out": None},
        "axes": rows,
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(table(result))
    if config.out is not None:
        write_json(config.out / "result.json", result)
    for name in rows:
        draw(config, name, result, console)
    return result


# -- measuring -------------------------------------------------------------------------------------


def axis(config: Config, name: str, values: Sequence[int], console: Console) -> dict[str, Any]:
    """Milliseconds and flops of every value's step, and their slopes."""
    from experiments.common.timing import turns

    runs: dict[str, Callable[[], None]] = {}
    flops: dict[int, float] = {}
    for value in values:
        with console.status(f"{name} {value} is compiled"):
            here = dataclasses.replace(config, **{name: value})
            runs[str(value)], flops[value] = prepared(here)
    with console.status(f"{len(values)} steps in turn, {config.rounds} times"):
        times = turns(runs, config.rounds)
    each = [[times[str(v)][i] for v in values] for i in range(config.rounds)]
    slopes = [slope(values, ms) for ms in each]
    return {
        "values": {
            str(v): {
                "ms": statistics.median(times[str(v)]),
                "range": [min(times[str(v)]), max(times[str(v)])],
                "flops": flops[v],
            }
            for v in values
        },
        "slope": statistics.median(slopes),
        "slope_range": [min(slopes), max(slopes)],
        "theory": slope(values, [flops[v] for v in values]),
    }


def prepared(config: Config) -> tuple[Callable[[], None], float]:
    """A step that is compiled, to be run, and the flops of its products."""
    import jax
    import numpy as np

    from experiments.common.decoders import LAYOUTS
    from experiments.common.peer_flops import products, step_flops
    from experiments.common.plan import plan
    from experiments.common.random_base import random_params
    from jpeft.models.llama import Llama
    from sharding import make_mesh

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(shape(config)))
        planned = plan(case(config, folder), make_mesh({"fsdp": 1}, jax.local_devices()[:1]))
        how = config.method, config.sequence, config.rank
        token = step_flops(products(path), *how, alike=True)
    params = random_params(
        jax.random.key(0), planned.dense, LAYOUTS[Llama].linear, None, planned.uses
    )
    trainable = planned.first(jax.random.key(1), params)
    frozen = planned.frozen_of(params, trainable)
    held = [planned.step.init(trainable)]
    size = (config.batch, config.sequence)
    ids = np.random.default_rng(0).integers(0, config.vocabulary, size, dtype=np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    key = jax.random.key(2)

    def run() -> None:
        held[0], metrics = planned.step(held[0], frozen, batch, key)
        float(metrics["loss"])

    run()
    return run, token * config.batch * config.sequence


def shape(config: Config) -> dict[str, Any]:
    """The decoder's configuration, in Hugging Face's words."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": 11 * config.width // 4,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // 64,
        "num_key_value_heads": config.width // 64,
        "max_position_embeddings": max(config.sequence, *config.sequences),
    }


def case(config: Config, model: str) -> Case:
    """The step, as plans are asked for."""
    from experiments.common.accounts import Case
    from experiments.common.methods import Sizes

    rows, rank = config.batch, Sizes(rank=config.rank, targets=())
    return Case(model, config.method, config.precision, 0, False, rows, config.sequence, rank)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the logarithms, by least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# -- table and plots -------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> Table:
    """Values down; what was measured and what is counted across."""
    out = Table(title=what(result["config"]))
    for column in ("", "ms", "ms, range", "Gflop", "Gflop/s"):
        out.add_column(column, justify="left" if not column else "right")
    for name, found in result["axes"].items():
        for value, r in found["values"].items():
            low, high = r["range"]
            rate = r["flops"] / r["ms"] / 1e6
            cells = (f"{r['ms']:,.1f}", f"{low:,.1f} to {high:,.1f}", f"{r['flops'] / 1e9:,.2f}")
            out.add_row(f"{name} {value}", *cells, f"{rate:,.0f}")
        low, high = found["slope_range"]
        measured = f"{found['slope']:.2f} ({low:.2f} to {high:.2f})"
        out.add_row(f"slope by {name}", measured, "", f"{found['theory']:.2f}", style="bold")
        out.add_section()
    return out


def what(config: dict[str, Any]) -> str:
    """The step in the middle, in words."""
    rank = f", LoRA of rank {config['rank']}" if config["method"] == "lora" else ", full"
    return (
        f"a step of a decoder {config['width']} wide: {config['layers']} layers, "
        f"{config['batch']} x {config['sequence']} tokens{rank}, {config['precision']}"
    )


def draw(config: Config, name: str, result: dict[str, Any], console: Console) -> None:
    """Measured times, and the flops at the rate of the step in the middle, both logarithmic."""
    found = result["axes"][name]
    x = [int(v) for v in found["values"]]
    ms = [r["ms"] for r in found["values"].values()]
    ends = [r["range"] for r in found["values"].values()]
    flops = [r["flops"] for r in found["values"].values()]
    middle = len(x) // 2
    with figure(config.out, f"step_cost_{name}", made_on(result), console) as axes:
        if axes is None:
            return
        errors = [
            [m - low for m, (low, _) in zip(ms, ends, strict=True)],
            [high - m for m, (_, high) in zip(ms, ends, strict=True)],
        ]
        label = f"measured, slope {found['slope']:.2f}"
        axes.errorbar(x, ms, errors, marker="o", capsize=3, color=COLOURS[0], label=label)
        at_rate = [f * ms[middle] / flops[middle] for f in flops]
        label = f"flops of products, at the rate of {x[middle]:,}: slope {found['theory']:.2f}"
        axes.plot(x, at_rate, linestyle="--", color=COLOURS[1], label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{v:,}" for v in x])
        axes.set_xlabel(NAMES[name])
        axes.set_ylabel("ms a training step")
        axes.set_title(what({**result["config"], name: "n"}), fontsize=8)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("step_cost", Config, main, __doc__))
