"""What training a model takes on TPUs that are not here: a step, compiled and read.

Bytes on a chip by kind, whether that fits, flops, collectives, and the least time that a step can
take. Only shapes are made, no weights. `--search` finds the largest batch that fits.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.common.command import command
from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Precision, Stage
from experiments.common.report import describe_machine, peak_memory, versions, write_json

if TYPE_CHECKING:
    from sharding.aot import Report


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile, and for what."""

    topology: str = "v5e:4x4"
    """A kind of TPU and the shape of its slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8."""
    slices: int = 1
    """So many slices, joined by the data-centre network."""
    model: str = "llama-3-8b"
    """A published model's name (experiments/common/named.py), a directory, or a config.json."""
    method: Method = "lora"
    """What is trained."""
    mesh: str | None = None
    """Devices, as data=2,fsdp=-1,tensor=4; without it all are on fsdp."""
    stage: Stage = 3
    """ZeRO's stage: 0 is data parallel, 3 shards parameters too."""
    batch: int = 256
    """Rows of a step, over all devices."""
    sequence: int = 2048
    """Tokens of a row."""
    precision: Precision | None = None
    """As finetune's; frozen parameters are in what the model computes in. Without it mixed for
    full fine-tuning and bfloat16 for the rest."""
    remat: bool = True
    """Forget activations and compute them again in the backward pass."""
    accumulate: int = 1
    """Take a batch in so many parts, and sum their gradients."""
    rank: int = 8
    """LoRA's rank, and that of its kin."""
    alpha: float = 16.0
    """LoRA's alpha."""
    targets: tuple[str, ...] = ()
    """LoRA's targets: regular expressions on parameter paths; without them query and value."""
    bottleneck: int = 64
    """The adapters' size."""
    prompt: int = 20
    """Virtual tokens of a prompt or a prefix."""
    dimensions: int = 2000
    """The subspaces' dimensions."""
    search: bool = False
    """Find the largest batch that fits, and report it; --batch is not read."""
    plain: bool = False
    """Compile without the interleaving of products with collectives, for counts as in theory."""
    out: pathlib.Path | None = None
    """Folder for result.json."""

    @property
    def sizes(self) -> Sizes:
        """What the method is built from."""
        names = {f.name for f in dataclasses.fields(Sizes)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return Sizes(**own)

    @property
    def numbers(self) -> Precision:
        """The precision."""
        return self.precision or ("mixed" if self.method == "full" else "bfloat16")


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Compile, print and write."""
    import jax

    from experiments.common.plan import plan
    from sharding import batch_shards, make_mesh
    from sharding.aot import PLAIN, compile_for, topology

    console = console or Console()
    start = time.perf_counter()
    if config.method in ("head", "top"):
        raise ValueError(f"--method {config.method} is a classifier's: there is no head here")
    mesh = make_mesh(config.mesh, topology(config.topology, config.slices))
    planned = plan(config, mesh)

    def report_of(rows: int) -> Report:
        with console.status(f"compiling {rows} rows for {mesh.size} devices"):
            options = PLAIN if config.plain else None
            return compile_for(*planned.arguments(rows), options=options)

    rows, tried = config.batch, {}
    if config.search:
        unit = batch_shards(mesh) * config.accumulate
        rows, tried = largest(report_of, unit, console)
    report = tried.get(rows) or report_of(rows)
    needed = planned.model_flops(rows)
    result = {
        "config": dataclasses.asdict(config) | {"out": None, "precision": config.numbers},
        "batch": rows,
        "mesh": dict(mesh.shape),
        "parameters": planned.parameters,
        "trained": planned.trained,
        **described(report, needed, rows * config.sequence),
        "tried": {str(n): r.memory.peak for n, r in sorted(tried.items())},
        "wall_seconds": time.perf_counter() - start,
        "peak_memory": peak_memory(),
        "machine": describe_machine(),
        "versions": versions("libtpu"),
    }
    del jax
    for shown in tables(result):
        console.print(shown)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def largest(
    report_of: Callable[[int], Report], unit: int, console: Console, most: int = 10
) -> tuple[int, dict[int, Report]]:
    """The largest batch, a multiple of `unit` rows, that fits, and what was tried on the way.

    Memory grows about linearly with the batch: each try is where the line through the two nearest
    ones meets what there is, kept between the largest that fits and the smallest that does not.

    **Raises:** `ValueError` where not even `unit` rows fit.
    """
    tried: dict[int, Report] = {}

    def fits(n: int) -> bool:
        report = tried[n] = report_of(n * unit)
        memory = report.memory
        console.print(f"{n * unit} rows: {_gib(memory.peak)} of {_gib(memory.limit)}")
        return report.fits

    if not fits(1):
        memory = tried[1].memory
        raise ValueError(
            f"{unit} rows, the fewest that these devices can share, take {_gib(memory.peak)} of "
            f"{_gib(memory.limit)} on each: try more devices, a higher --stage, or tensor=... in "
            "--mesh"
        )
    low, high, guess = 1, None, 2
    while (high is None or high - low > 1) and len(tried) < most:
        if fits(guess):
            low = guess
        else:
            high = guess
        guess = _next(tried, low, high)
    return low * unit, {n * unit: r for n, r in tried.items()}


def _next(tried: dict[int, Report], low: int, high: int | None) -> int:
    """Where the line through the last two that fit, or around the limit, meets the limit."""
    known = sorted(tried)
    first = known[known.index(low) - 1] if high is None else low
    second = low if high is None else high
    at, to = tried[first].memory.peak, tried[second].memory.peak
    slope = (to - at) / max(second - first, 1)
    limit = tried[low].memory.limit
    met = int((limit - tried[low].memory.peak) / slope) + low if slope > 0 else 2 * low
    if high is None:
        return min(max(met, low + 1), 8 * low)
    return min(max(met, low + 1), high - 1)


def described(report: Report, model_flops: float, tokens: int) -> dict[str, Any]:
    """The report, as `result.json` has it: bytes, flops and seconds, of one device where it says
    so.
    """
    m, line = report.memory, report.roofline
    arguments = dict(m.arguments)
    estimate: dict[str, Any] = {}
    if line is not None:
        estimate = dataclasses.asdict(line) | {
            "step_seconds": line.seconds,
            "bound": line.bound,
            "mfu": report.utilisation(model_flops),
            "hfu": report.utilisation(),
            "tokens_per_second_per_chip": tokens / line.seconds / _chips(report),
        }
    return {
        "chip": dataclasses.asdict(report.chip),
        "devices": report.devices,
        "fits": report.fits,
        "bytes_per_device": {
            **arguments,
            "outputs": m.outputs,
            "temporaries": m.temporaries,
            "code": m.code,
            "total": m.peak,
            "limit": m.limit,
        },
        "flops": {
            "model": model_flops,
            "step": report.flops,
            "compiled_per_device": report.flops_per_device,
            "replication": report.flops_per_device * report.devices / report.flops,
        },
        "traffic_bytes_per_device": report.traffic,
        "collectives": {
            kind: dataclasses.asdict(total)
            | {
                "largest": max(c.bytes for c in report.collectives if c.kind == kind),
                "outside_loops": sum(
                    c.bytes for c in report.collectives if c.kind == kind and not c.inside_loop
                ),
            }
            for kind, total in report.by_kind.items()
        },
        "estimate": estimate,
        "compile_seconds": dict(report.seconds),
    }


def _chips(report: Report) -> float:
    return report.devices / report.chip.devices


def tables(result: dict[str, Any]) -> list[Table]:
    """Memory by kind; collectives by kind; flops and the estimate."""
    config, held = result["config"], result["bytes_per_device"]
    what = f"{config['model']}, {config['method']}, stage {config['stage']}, {config['precision']}"
    where = f"{result['devices']} devices of {config['topology']}"
    size = f"{result['batch']} x {config['sequence']} tokens"
    memory = Table(title=f"{what}, {size}, {where}")
    memory.add_column("on each device")
    memory.add_column("GiB", justify="right")
    for kind, n in held.items():
        if kind not in ("total", "limit") and n:
            memory.add_row(kind, f"{n / 2**30:,.3f}")
    memory.add_section()
    memory.add_row("total", f"{held['total'] / 2**30:,.3f}")
    fits = "fits" if result["fits"] else "does not fit"
    memory.add_row(f"there is: {fits}", f"{held['limit'] / 2**30:,.3f}")
    if not result["fits"]:
        return [memory]
    wires = Table(title="collectives of a step, on each device")
    for name in ("kind", "runs", "elements", "GiB", "GiB outside loops", "largest, MiB"):
        wires.add_column(name, justify="left" if name == "kind" else "right")
    for kind, c in result["collectives"].items():
        wires.add_row(
            kind,
            f"{c['runs']:,}",
            f"{c['elements']:,}",
            f"{c['bytes'] / 2**30:,.3f}",
            f"{c['outside_loops'] / 2**30:,.3f}",
            f"{c['largest'] / 2**20:,.1f}",
        )
    flops, line = result["flops"], result["estimate"]
    time_ = Table(title="the least time of a step (nothing waits, all at their peak)")
    time_.add_column("")
    time_.add_column("seconds", justify="right")
    for name in ("compute", "memory", "wires"):
        time_.add_row(name, f"{line[name]:.4f}")
    time_.add_section()
    time_.add_row(f"step, bound by {line['bound']}", f"{line['step_seconds']:.4f}")
    time_.caption = (
        f"{flops['step'] / 1e15:,.3f} Pflop a step, {flops['model'] / 1e15:,.3f} without what is "
        f"computed again; {flops['replication']:.3f} of it in the program; MFU at most "
        f"{line['mfu']:.1%}, {line['tokens_per_second_per_chip']:,.0f} tokens/s a chip"
    )
    return [memory, wires, time_]


def _gib(n: float) -> str:
    return f"{n / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(command("aot", Config, main, __doc__))
