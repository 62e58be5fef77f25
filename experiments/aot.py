"""What training a model takes on TPUs or GPUs that are not here: a step, compiled and read.

Bytes on a device by kind, whether that fits, flops, collectives, and the least time that a step can
take. Only shapes are made, no weights. `--search` finds the largest batch that fits.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.common.command import command, ready
from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Keep, Optimiser, Precision, Quantised, Stage
from experiments.common.options import at_least
from experiments.common.report import COMPILERS, describe_machine, peak_memory, versions, write_json

if TYPE_CHECKING:
    from sharding.aot import Report


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile, and for what."""

    topology: str = "v5e:4x4"
    """A kind of TPU and the shape of its slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8, or one of
    GPU and how many hosts have how many each, such as h100:2x8."""
    slices: int = 1
    """So many slices of TPUs, joined by the data-centre network."""
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
    quantize: Quantised | None = None
    """Frozen weights of linear layers (but the head) in this format."""
    optimiser: Optimiser = "adamw"
    """AdamW with moments in float32, or in 8 bits."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between steps."""
    remat: bool = True
    """Forget activations and compute them again in the backward pass."""
    keep: Keep = "nothing"
    """What --remat keeps of a layer: nothing, all products, or those with weights."""
    accumulate: int = 1
    """Take a batch in so many parts, and sum their gradients."""
    chunk: int = 1024
    """Tokens whose logits a device makes at a time. Where the head is trained its gradient is
    summed over devices once for each: more of them then save much of what goes over the wires."""
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
    options: tuple[str, ...] = ()
    """More options of the compiler, as name=value."""
    out: pathlib.Path | None = None
    """Folder for result.json."""
    overwrite: bool = False
    """Write over a result that --out holds."""

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
    console = console or Console()
    start = time.perf_counter()
    at_least(config, batch=1, sequence=1, accumulate=1, chunk=1)
    if config.method in ("head", "top"):
        raise ValueError(f"--method {config.method} is a classifier's: there is no head here")
    ready(config.out, config.overwrite)
    found = searched(config, console) if config.search else compiled(config)
    result = found | {
        "wall_seconds": time.perf_counter() - start,
        "peak_memory": peak_memory(),
        "machine": describe_machine(),
        "versions": versions(*COMPILERS),
    }
    show(result, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def compiled(config: Config) -> dict[str, Any]:
    """What the compiled step says, as `result.json` has it."""
    from experiments.common.plan import plan
    from sharding import make_mesh
    from sharding.aot import compile_for, options_for, topology

    mesh = make_mesh(config.mesh, topology(config.topology, config.slices))
    options = options_for(mesh, config.plain) | parsed(config.options)
    planned = plan(config, mesh)
    report = compile_for(*planned.arguments(config.batch), options=options)
    needed = planned.model_flops(config.batch)
    return {
        "config": dataclasses.asdict(config)
        | {"out": None, "overwrite": False, "precision": config.numbers},
        "mesh": dict(mesh.shape),
        "parameters": planned.parameters,
        "trained": planned.trained,
        **described(report, needed, config.batch * config.sequence),
    }


def searched(config: Config, console: Console) -> dict[str, Any]:
    """What the largest batch says that fits."""
    from experiments.common.largest import Tried, apart, largest
    from sharding import batch_shards, make_mesh
    from sharding.aot import topology

    mesh = make_mesh(config.mesh, topology(config.topology, config.slices))
    results: dict[int, dict[str, Any]] = {}

    def attempt(rows: int) -> Tried | None:
        with console.status(f"compiling {rows} rows"):
            result = apart(compiled, dataclasses.replace(config, batch=rows))
        if result is None:
            console.print(f"{rows} rows: the compiler crashed")
            return None
        results[rows] = result
        held = result["bytes_per_device"]
        tried = Tried(held["total"], held["limit"], result["fits"])
        console.print(f"{rows} rows: {tried}")
        return tried

    rows = largest(attempt, batch_shards(mesh) * config.accumulate)
    totals = {str(n): r["bytes_per_device"]["total"] for n, r in sorted(results.items())}
    return results[rows] | {"tried": totals}


def parsed(options: tuple[str, ...]) -> dict[str, str]:
    """Compiler options by name. **Raises:** `ValueError` for one without a value."""
    pairs = [option.partition("=") for option in options]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ValueError(f"--options takes name=value: '{name}{equals}' is none")
    return {name.lstrip("-"): value for name, _, value in pairs}


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
            "total": m.total,
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


def show(result: dict[str, Any], console: Console) -> None:
    """Memory by kind; where it fits, collectives by kind, the estimate, and flops."""
    config, held = result["config"], result["bytes_per_device"]
    console.print(
        f"{config['model']}, {result['trained']:,} of {result['parameters']:,} parameters trained "
        f"({config['method']}), stage {config['stage']}, {config['precision']}; "
        f"{config['batch']} x {config['sequence']} tokens on {result['devices']} devices of "
        f"{config['topology']}, {', '.join(f'{k}={v}' for k, v in result['mesh'].items())}",
        highlight=False,
    )
    memory = _table("memory", "on each device", "GiB")
    for kind, n in held.items():
        if kind not in ("total", "limit") and n:
            memory.add_row(kind, f"{n / 2**30:,.3f}")
    memory.add_section()
    memory.add_row("total", f"{held['total'] / 2**30:,.3f}")
    fits = "it fits" if result["fits"] else "it does not fit"
    memory.add_row(f"there is ({fits})", f"{held['limit'] / 2**30:,.3f}")
    console.print(memory)
    if not result["fits"]:
        return
    wires = _table("collectives of a step", "on each device", "runs", "GiB", "GiB outside loops")
    for kind, c in result["collectives"].items():
        numbers = (f"{c['bytes'] / 2**30:,.3f}", f"{c['outside_loops'] / 2**30:,.3f}")
        wires.add_row(kind, f"{c['runs']:,}", *numbers)
    console.print(wires)
    flops, line = result["flops"], result["estimate"]
    least = _table("the least time of a step", "all at their peak, nothing waits", "seconds")
    for name in ("compute", "memory", "wires"):
        least.add_row(name, f"{line[name]:.4f}")
    least.add_section()
    least.add_row(f"step, bound by {line['bound']}", f"{line['step_seconds']:.4f}")
    console.print(least)
    console.print(
        f"{flops['step'] / 1e15:,.3f} Pflop a step, {flops['model'] / 1e15:,.3f} without what is "
        f"computed again; the program's on all devices are {flops['replication']:.3f} of that. At "
        f"most {line['mfu']:.1%} MFU and {line['tokens_per_second_per_chip']:,.0f} tokens/s a chip",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    out = Table(title=title)
    for i, name in enumerate(columns):
        out.add_column(name, justify="right" if i else "left")
    return out


if __name__ == "__main__":
    from sharding.tpus import alone

    with alone():
        sys.exit(command("aot", Config, main, __doc__))
