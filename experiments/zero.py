"""ZeRO's stages on four devices, as pictures: what each device has, and what it holds in a step.

Bytes are those of the shardings that training uses; the walk through a step is read from the
program compiled for four TPUs or GPUs that need not be there.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.common.command import command, ready
from experiments.common.numbers import Stage
from experiments.common.options import at_least
from experiments.common.plots import COLOURS, figure
from experiments.common.report import COMPILERS, describe_machine, versions, write_json

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
KINDS = ("parameters", "gradients", "optimiser")
# How many devices the step that is walked through has.
WALKERS = 4
WALK = ("whole layer", "gradients", "activations")


@dataclasses.dataclass(frozen=True)
class Config:
    """A stack of layers, each an MLP, trained by Adam with bf16 parameters and moments."""

    width: int = 4096
    """The residual stream's width; an MLP's inner one is four times as wide."""
    layers: int = 4
    """M0, M1, ..."""
    rows: int = 12288
    """Rows of a batch, over all devices."""
    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of devices to share among, in the first picture; the table is of four."""
    stages: tuple[Stage, ...] = STAGES
    """ZeRO's stages whose step is compiled."""
    topology: str = "v5e:2x2"
    """What the step is compiled for: four TPUs, or GPUs such as h100:1x4."""
    out: pathlib.Path | None = None
    """Folder for result.json and the pictures."""
    overwrite: bool = False
    """Write over a result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Count, compile, print, draw and write."""
    console = console or Console()
    at_least(config, width=1, layers=1, rows=1, devices=1)
    ready(config.out, config.overwrite)
    counts = dict.fromkeys((*config.devices, WALKERS))
    shares = {str(s): {str(n): share(config, s, n) for n in counts} for s in STAGES}
    walks = {str(s): walk(config, s) for s in config.stages}
    result = {
        "config": dataclasses.asdict(config) | {"out": None, "overwrite": False},
        "shares": shares,
        "walks": walks,
        "machine": describe_machine(),
        "versions": versions(*COMPILERS),
    }
    console.print(table(config, result))
    draw_shares(config, result, console)
    draw_walks(config, result, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def shapes(config: Config) -> dict[str, Any]:
    """The parameters' shapes, stacked over layers."""
    import jax
    import jax.numpy as jnp

    d, f = config.width, 4 * config.width
    sides = {"up": (d, f), "down": (f, d)}
    return {
        "layers": {
            n: jax.ShapeDtypeStruct((config.layers, *s), jnp.bfloat16) for n, s in sides.items()
        }
    }


def names(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The names of a parameter's axes."""
    del path
    return ("layers", *[None] * (len(shape) - 1))


def share(config: Config, stage: int, devices: int) -> dict[str, int]:
    """Bytes of each kind on one of so many devices, by the shardings of that stage."""
    import jax
    import optax
    from jax.sharding import AbstractMesh

    from sharding import AXES, Zero

    zero = Zero(AbstractMesh((1, devices, 1), AXES), stage)  # type: ignore[arg-type]
    params = shapes(config)
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    of = {
        "parameters": (params, zero.parameters(params, names)),
        "gradients": (params, zero.gradients(params, names)),
        "optimiser": (state, zero.optimiser(state, params, names)),
    }
    return {kind: _bytes(*pair) for kind, pair in of.items()}


def _bytes(tree: Any, shardings: Any) -> int:
    import jax

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def walk(config: Config, stage: int) -> dict[str, Any]:
    """A step of four devices: its moments, from the compiled program."""
    import jax
    import jax.numpy as jnp
    import optax

    from sharding import Zero, make_mesh, make_step
    from sharding.aot import argument_bytes, not_cached, options_for, placed, topology
    from sharding.timeline import Instruction, source_of, timeline

    def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, w: Any) -> Any:
            return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

        out, _ = jax.lax.scan(layer, batch["x"], params["layers"])
        return jnp.mean(out.astype(jnp.float32) ** 2)

    devices = topology(config.topology)
    if len(devices) != WALKERS:
        raise ValueError(
            f"--topology {config.topology} has {len(devices)} devices: the step is of {WALKERS}"
        )
    zero = Zero(make_mesh(None, devices), stage)
    step = make_step(loss, optax.adam(1e-3), zero=zero, axes=names)
    params = shapes(config)
    batch = {"x": jax.ShapeDtypeStruct((config.rows, config.width), jnp.bfloat16)}
    state, batch = step.abstract(params), placed(batch, zero.batch(batch))
    lowered = step.lower(state, None, batch)
    with not_cached():
        compiled = lowered.compile(compiler_options=options_for(zero.mesh, plain=True))
    layer = {x.shape[1:] for x in jax.tree.leaves(params)}
    stacked = {
        s.shard_shape(x.shape)
        for tree in (zero.gradients(params, names), zero.reduced(params, names))
        for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(tree), strict=True)
    }

    def kind_of(i: Instruction) -> str:
        backward = "transpose(jvp" in source_of(i) and "rematted" not in source_of(i)
        found = {tuple(n for n in t.shape if n > 1) for t in i.results}
        if found & layer:
            return "gradients" if backward and "dot_general" in source_of(i) else "whole layer"
        return "gradients" if backward and found & stacked else "activations"

    text = compiled.as_text()
    assert text is not None
    moments = timeline(text, kind_of, smallest=config.width * config.width // 4)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    backward = next(
        (i for i, m in enumerate(moments) if m.loops and "transpose(jvp" in m.source), len(moments)
    )
    # The passes of the backward loop begin with its first moment, whatever that one is from.
    while backward and backward < len(moments) and moments[backward - 1].loops == (0,):
        backward -= 1
    return {
        "arguments": argument_bytes(state, None, batch),
        "temporaries": analysis.temp_size_in_bytes,
        "moments": [
            {
                "what": event(m),
                "layer": _layer(m, config.layers, i >= backward),
                "live": {k: m.live.get(k, 0) for k in WALK},
            }
            for i, m in enumerate(moments)
        ],
    }


def event(moment: Any) -> str:
    """`gather`, `reduce`, `compute` or nothing that a picture marks."""
    if moment.op.startswith("all-gather") or (moment.kind == "whole layer" and not moment.source):
        return "gather"
    if moment.op.startswith(("all-reduce", "reduce-scatter")):
        return "reduce"
    return "compute" if "dot_general" in moment.source else ""


def _layer(moment: Any, layers: int, backward: bool) -> str:
    """Which layer and which way, such as `M2 backward`; empty outside of the layers."""
    if not moment.loops:
        return ""
    number = moment.loops[0]
    return f"M{layers - 1 - number} backward" if backward else f"M{number} forward"


def table(config: Config, result: dict[str, Any]) -> Table:
    """Bytes on each of four devices, and what its program takes."""
    n = str(WALKERS)
    out = Table(title=f"MiB on each of {n} devices")
    for name in ("stage", *KINDS, "highest in a step, beside them"):
        out.add_column(name, justify="right")
    for s in config.stages:
        cells = [f"{result['shares'][str(s)][n][k] / 2**20:,.0f}" for k in KINDS]
        out.add_row(str(s), *cells, f"{result['walks'][str(s)]['temporaries'] / 2**20:,.0f}")
    return out


def _source(result: dict[str, Any]) -> str:
    c = result["config"]
    return (
        f"{c['layers']} layers of {c['width']} x {4 * c['width']}, bf16, Adam; compiled for "
        f"{c['topology']}, jax {result['versions']['jax']}, {result['machine']['date']}"
    )


def draw_shares(config: Config, result: dict[str, Any], console: Console) -> None:
    """Stacked bars: a group for each number of devices, a bar for each stage."""
    with figure(config.out, "shares", _source(result), console, (8.0, 4.2)) as axes:
        if axes is None:
            return
        for j, s in enumerate(STAGES):
            x = np.arange(len(config.devices)) + (j - 1.5) * 0.2
            bottom = np.zeros(len(config.devices))
            for colour, kind in zip(COLOURS, KINDS, strict=False):
                y = [result["shares"][str(s)][str(n)][kind] / 1e9 for n in config.devices]
                axes.bar(x, y, 0.18, bottom, color=colour, label=kind if j == 0 else None)
                bottom += y
            for at, top in zip(x, bottom, strict=True):
                axes.text(at, top, str(s), ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(config.devices)), [str(n) for n in config.devices])
        axes.set_xlabel("devices (bars: ZeRO's stages 0, 1, 2, 3)")
        axes.set_ylabel("GB on each device, kept between its uses")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_walks(config: Config, result: dict[str, Any], console: Console) -> None:
    """What a device holds at every moment of a step, a picture a stage."""
    for s in config.stages:
        name = f"step_stage{s}"
        with figure(config.out, name, _source(result), console, (9.0, 4.4)) as axes:
            if axes is not None:
                _draw_walk(axes, result["walks"][str(s)], s)


def _draw_walk(axes: Any, found: dict[str, Any], stage: int) -> None:
    moments = found["moments"]
    x = np.arange(len(moments))
    kept = {
        "parameters kept": found["arguments"]["trainable"],
        "optimiser's state": found["arguments"]["optimiser"],
    }
    bands = [np.full(len(moments), n / 1e9) for n in kept.values()]
    bands += [np.array([m["live"][k] / 1e9 for m in moments]) for k in WALK]
    shades = ("0.55", "0.75", *COLOURS[:3])
    axes.stackplot(x, *bands, labels=[*kept, *WALK], colors=shades, step="post", linewidth=0)
    top = np.sum(bands, axis=0)
    high = float(top.max())
    marks = {"gather": ("^", "k"), "compute": (".", "0.4"), "reduce": ("v", COLOURS[1])}
    for what, (marker, colour) in marks.items():
        at = [i for i, m in enumerate(moments) if m["what"] == what]
        if at:
            y = [high * 1.04] * len(at)
            axes.plot(at, y, marker, color=colour, markersize=5, linestyle="", label=what)
    start = 0
    for i in range(1, len(moments) + 1):
        if i < len(moments) and moments[i]["layer"] == moments[start]["layer"]:
            continue
        layer = moments[start]["layer"]
        if layer:
            axes.axvline(start, color="0.6", linewidth=0.5)
            number, way = layer.split()
            label = f"{number}\n{way}"
            axes.text((start + i - 1) / 2, high * 1.1, label, ha="center", fontsize=7)
        start = i
    axes.set_ylim(0, high * 1.25)
    axes.set_xlim(0, max(len(moments) - 1, 1))
    axes.set_xticks([])
    axes.set_xlabel("one training step, from left to right, at every large buffer")
    axes.set_ylabel("GB on each of four devices")
    axes.set_title(f"ZeRO stage {stage}", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    sys.exit(command("zero", Config, main, __doc__))
