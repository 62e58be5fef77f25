"""The account of training memory: a rule of thumb, a model's own step, and what compilers say.

`--params 1e9` alone is the rule: 4 bytes of weights, 4 of gradients, 8 of Adam's state and about 8
of activations for each parameter; it has --trained, --precision, --stage and --devices. `--model`
takes the shapes of a model's step, without weights or a compiler, and all options but --trained;
`--check` sets that beside the compiled programs' own figures.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.common.accounts import (
    Case,
    Optimiser,
    cases,
    compared,
    compiled,
    held_out,
    in_parts,
    predicted,
    seen_by_one,
)
from experiments.common.command import command, ready
from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Keep, Precision, Stage
from experiments.common.options import at_least
from experiments.common.plots import COLOURS, figure
from experiments.common.report import describe_machine, versions, write_json

if TYPE_CHECKING:
    from jpeft.memory import Account

SHADES = dict(
    zip(
        ("frozen", "trained", "masters", "optimiser", "gradients", "activations", "gathered"),
        COLOURS,
        strict=True,
    )
) | {"gathered": "#f0e442", "batch": "#999999", "working": "#bbbbbb"}
# What says where a result goes; and what is read with --params.
UNTOLD: dict[str, Any] = {"out": None, "overwrite": False}
OF_RULE = {"trained", "precision", "stage", "devices"}
# What the check compiles for: its memory holds every case.
TOPOLOGY, DEVICES = "v5p:2x2x2", 8


@dataclasses.dataclass(frozen=True)
class Config:
    """What to account for."""

    params: float | None = None
    """So many parameters, by the rule of thumb."""
    trained: float | None = None
    """Of the --params; all without it."""
    model: str | None = None
    """A published model's name (experiments/common/named.py), a directory, or a config.json."""
    method: Method = "full"
    """What is trained."""
    precision: Precision = "float32"
    """As finetune's: mixed is bf16 with fp32 masters."""
    optimiser: Optimiser = "adam"
    """Of the model's step."""
    stage: Stage = 0
    """ZeRO's."""
    devices: int = 1
    """How many share the work, all on the mesh axis fsdp; without --mesh."""
    mesh: str | None = None
    """Or how they do, of the model's step: data=2,fsdp=4,tensor=2."""
    accumulate: int = 1
    """Take a batch in so many parts, and sum their gradients."""
    batch: int = 8
    """Rows of a step, over all devices."""
    sequence: int = 512
    """Tokens of a row."""
    remat: bool = False
    """Forget activations and compute them again in the backward pass."""
    keep: Keep = "nothing"
    """What --remat keeps of a layer: nothing, all products, or those with weights."""
    rank: int = 8
    """LoRA's rank, and that of its kin."""
    targets: tuple[str, ...] = ()
    """LoRA's targets: regular expressions on parameter paths; without them query and value."""
    check: bool = False
    """Compile twelve steps for a TPU, and four that were held out, and compare."""
    check_parts: bool = False
    """The same of six steps whose layers, or batches, are in parts."""
    out: pathlib.Path | None = None
    """Folder for `result.json` and the plot."""
    overwrite: bool = False
    """Write over a result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Account, print and write."""
    console = console or Console()
    refuse(config)
    ready(config.out, config.overwrite)
    check = config.check or config.check_parts
    result: dict[str, Any] = {"config": dataclasses.asdict(config) | UNTOLD}
    if check:
        result |= checked(in_parts() if config.check_parts else [*cases(), *held_out()], console)
    elif config.model is not None:
        result |= by_stage(config)
    else:
        result |= rule(config)
    console.print(check_table(result) if check else account_table(config, result))
    result |= {"machine": describe_machine(), "versions": versions("libtpu")}
    if config.out is not None:
        write_json(config.out / "result.json", result)
    draw(config, result, console)
    return result


def refuse(config: Config) -> None:
    """**Raises:** `ValueError` for options that cannot be, or that would not be read."""
    ways = ("params", "model", "check", "check_parts")
    fields = dataclasses.fields(config)
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    chosen = [name for name in given if name in ways]
    if len(chosen) != 1:
        raise ValueError("pass one of --params, --model, --check and --check-parts")
    way = chosen[0]
    of_step = {f.name for f in fields} - {"trained"}
    read = {"params": OF_RULE, "model": of_step}.get(way, set()) | {way, *UNTOLD}
    for name in given:
        if name not in read:
            told = f"--{name} is not read with --{way}: leave it out"
            raise ValueError(told.replace("_", "-"))
    at_least(config, devices=1, accumulate=1, batch=1, sequence=1)


# -- the accounts ----------------------------------------------------------------------------------


def rule(config: Config) -> dict[str, Any]:
    """The rule of thumb, at every stage that the devices have."""
    from jpeft.memory import rule_of_thumb

    assert config.params is not None
    precision = config.precision
    if precision not in ("float32", "mixed"):
        raise ValueError(f"the rule of thumb has float32 and mixed; got --precision {precision}")
    return _stages(
        config,
        config.devices,
        lambda stage: rule_of_thumb(
            config.params or 0,
            trained=config.trained,
            precision=precision,
            stage=stage,
            devices=config.devices,
        ),
    )


def by_stage(config: Config) -> dict[str, Any]:
    """The account of a model's step, at every stage that the devices have."""
    if config.method in ("head", "top"):
        raise ValueError(f"--method {config.method} is a classifier's: there is no head here")
    sizes = _sizes(config)
    case = Case(
        config.model or "",
        config.method,
        config.precision,
        config.stage,
        config.remat,
        config.batch,
        config.sequence,
        Sizes(rank=config.rank, targets=config.targets),
        accumulate=config.accumulate,
        keep=config.keep,
    )
    planned = seen_by_one(case)

    def at(stage: Stage) -> Account:
        here = dataclasses.replace(case, stage=stage)
        return predicted(here, sizes, config.optimiser, planned=planned)

    return _stages(config, math.prod(sizes), at)


def _sizes(config: Config) -> tuple[int, int, int]:
    """Of `data`, `fsdp` and `tensor`."""
    from sharding.mesh import mesh_sizes, parsed_mesh

    if config.mesh is None:
        return mesh_sizes(None, config.devices)
    if config.devices != 1:
        raise ValueError("pass one of --devices and --mesh")
    named = parsed_mesh(config.mesh)
    if -1 in named.values():
        raise ValueError(f"--mesh {config.mesh}: say how many, no devices are here to be left")
    return mesh_sizes(named, math.prod(named.values()))


def _stages(config: Config, devices: int, at: Any) -> dict[str, Any]:
    stages = (0, 1, 2, 3) if devices > 1 else (config.stage,)
    accounts = {stage: at(stage) for stage in stages}
    return {
        "bytes_per_device": accounts[config.stage].kinds(),
        "total": accounts[config.stage].total,
        "stages": {str(stage): a.kinds() for stage, a in accounts.items()},
    }


# -- against compilers -----------------------------------------------------------------------------


def checked(asked: Sequence[Case], console: Console) -> dict[str, Any]:
    """Predictions beside programs."""
    from sharding import make_mesh
    from sharding.aot import topology
    from sharding.mesh import mesh_sizes

    devices = topology(TOPOLOGY)
    rows: list[dict[str, Any]] = []
    for case in asked:
        with console.status(case.title):
            found = compiled(case, make_mesh(case.mesh, devices))
            r = compared(case, predicted(case, mesh_sizes(case.mesh, DEVICES)), found)
        rows.append(r | {"held_out": case in held_out()})
        console.print(f"{case.title}: {r['error']:+.1%}")
    worst = max(abs(r["error"]) for r in rows)
    within = sum(abs(r["error"]) <= 0.1 for r in rows)
    return {"topology": TOPOLOGY, "rows": rows, "worst": worst, "within_10_percent": within}


# -- tables and pictures ---------------------------------------------------------------------------


def account_table(config: Config, result: dict[str, Any]) -> Table:
    """Kinds down, stages across."""
    table = Table(title=_what(config))
    table.add_column("GB on each device")
    stages = result["stages"]
    for stage in stages:
        title = f"stage {stage}" if len(stages) > 1 else "GB"
        table.add_column(title, justify="right", style="bold" if int(stage) == config.stage else "")
    for kind in next(iter(stages.values())):
        cells = [kinds[kind] for kinds in stages.values()]
        if any(cells):
            table.add_row(kind, *(f"{n / 1e9:,.3f}" for n in cells))
    table.add_section()
    table.add_row("total", *(f"{sum(kinds.values()) / 1e9:,.3f}" for kinds in stages.values()))
    return table


def check_table(result: dict[str, Any]) -> Table:
    """Cases down; predicted, peak, the sum of arguments and temporaries."""
    table = Table(title=f"one of {DEVICES} devices of {result['topology']}, GB")
    table.add_column("step")
    for name in ("predicted", "peak", "error", "arguments + temporaries", "error"):
        table.add_column(name, justify="right")
    for r in result["rows"]:
        table.add_row(
            r["title"] + (" (held out)" if r["held_out"] else ""),
            f"{r['predicted_total'] / 1e9:.3f}",
            f"{r['measured_peak'] / 1e9:.3f}",
            f"{r['error']:+.1%}",
            f"{r['measured_total'] / 1e9:.3f}",
            f"{r['error_of_total']:+.1%}",
        )
    return table


def _what(config: Config) -> str:
    many = f", {config.devices} devices" if config.devices > 1 else ""
    many = f", {config.mesh}" if config.mesh else many
    if config.model is None:
        size = f"{config.params:,.0f} parameters"
        if config.trained is not None:
            size += f", {config.trained:,.0f} trained"
        return f"{size}, {config.precision}, Adam{many}"
    keeps = ", remat" if config.remat else ""
    keeps += f" but {config.keep}" if config.keep != "nothing" else ""
    keeps += f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    return (
        f"{pathlib.Path(config.model).name}, {config.method}, {config.precision}, "
        f"{config.optimiser}, {config.batch} x {config.sequence} tokens{keeps}{many}"
    )


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Stacked bars: a stage each, or a case each with what its program says."""
    version = f"jax {result['versions']['jax']}, {result['machine']['date']}"
    check = config.check or config.check_parts
    if check:
        source = f"predicted from shapes, and compiled for {result['topology']}; {version}"
        bars = {r["title"]: r["predicted"] for r in result["rows"]}
        title = "predicted (bars) and compiled (marks): the most memory of a training step"
    else:
        way = "rule of thumb" if config.model is None else "from the step's shapes, not compiled"
        source = f"{way}; {version}"
        one = len(result["stages"]) == 1
        bars = {("" if one else f"stage {s}"): kinds for s, kinds in result["stages"].items()}
        title = _what(config)
    size = (8.0, 1.6 + 0.42 * len(bars))
    with figure(config.out, "memory", source, console, size) as axes:
        if axes is None:
            return
        left = [0.0] * len(bars)
        for kind, shade in SHADES.items():
            widths = [kinds[kind] / 1e9 for kinds in bars.values()]
            if max(widths) > 0.002 * max(sum(k.values()) / 1e9 for k in bars.values()):
                axes.barh(range(len(bars)), widths, left=left, color=shade, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        if check:
            peaks = [r["measured_peak"] / 1e9 for r in result["rows"]]
            axes.plot(
                peaks, range(len(bars)), "k|", markersize=16, markeredgewidth=2, label="compiled"
            )
        else:
            for i, n in enumerate(left):
                axes.text(n, i, f" {n:,.1f}", va="center", fontsize=8)
            axes.margins(x=0.1)
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("GB on each device")
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    sys.exit(command("memory", Config, main, __doc__))
