"""What one device holds of a large model's QLoRA step, from the step compiled for that device."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Keep, Optimiser, Precision, Quantised, Stage

# The smallest slice of a kind whose chip has the memory to compile it all; one chip is used.
TOPOLOGY = "v5p:2x2x1"
GPU = 48e9


@dataclasses.dataclass(frozen=True)
class Case:
    """A step, as `experiments.common.plan` asks for it: the paper's, on short rows."""

    model: str
    numbers: Precision
    optimiser: Optimiser = "adamw"
    offload: bool = False
    sizes: Sizes = Sizes(rank=64, alpha=16.0, targets=(r"_proj/kernel$",))
    quantize: Quantised | None = "nf4"
    method: Method = "lora"
    stage: Stage = 0
    remat: bool = True
    keep: Keep = "nothing"
    accumulate: int = 1
    sequence: int = 512
    chunk: int = 1024

    @property
    def title(self) -> str:
        """Where the optimiser's state is, and in what."""
        trained = {"bfloat16": "fp32", "stochastic": "bf16", "mixed": "bf16, fp32 masters"}
        moments = "8-bit" if self.optimiser == "adamw8bit" else "fp32"
        where = " on the host" if self.offload else ""
        return f"trained arrays {trained[self.numbers]}; {moments} moments{where}"


def cases() -> list[Case]:
    """Both models, with the optimiser's state as it is, in 8 bits, and in the host's memory."""
    return [
        case
        for model in ("llama-65b", "llama-3-8b")
        for case in (
            Case(model, "bfloat16"),
            Case(model, "stochastic", "adamw8bit"),
            Case(model, "mixed", offload=True),
        )
    ]


def account(case: Case, name: str = TOPOLOGY) -> dict[str, Any]:
    """Bytes of the device by kind, and what of the optimiser's state is on the host.

    **Arguments:** `name`, a topology, of which one device is used.

    **Raises:** `TopologyError` where its compiler is not installed.
    """
    from experiments.common.plan import plan
    from sharding import make_mesh
    from sharding.aot import compile_for, options_for, topology

    mesh = make_mesh({"fsdp": 1}, topology(name)[:1])
    planned = plan(case, mesh)
    report = compile_for(*planned.arguments(1), options=options_for(mesh))
    m = report.memory
    kinds = {**m.arguments, "outputs": m.outputs, "temporaries": m.temporaries, "code": m.code}
    return {
        **{k: v for k, v in dataclasses.asdict(case).items() if k != "sizes"},
        "rank": case.sizes.rank,
        "title": case.title,
        "parameters": planned.parameters,
        "trained": planned.trained,
        "bytes": {k: n for k, n in kinds.items() if n},
        "total": m.total,
        "host": m.host,
        "compile_seconds": dict(report.seconds),
    }


def accounts(console: Console, name: str = TOPOLOGY) -> list[dict[str, Any]]:
    """Every case's; on GPUs those alone whose optimiser is on the device."""
    from sharding.aot import topology

    # GPUs that are not here come without their host's memory.
    gpu = topology(name)[0].platform == "gpu"
    if gpu:
        console.print(f"for {name} what is kept on the host cannot be compiled, and is left out")
    rows: list[dict[str, Any]] = []
    for case in cases():
        if gpu and case.offload:
            continue
        with console.status(f"compiling {case.model}: {case.title}"):
            rows.append(account(case, name))
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """One model's accounts: kinds down, cases across."""
    first = rows[0]
    out = Table(
        title=f"{first['model']}, {first['parameters'] / 1e9:.1f}B parameters, linear layers in "
        f"{first['quantize']}, LoRA of rank {first['rank']} on each "
        f"({first['trained'] / 1e6:,.0f}M), 1 x {first['sequence']} tokens"
    )
    out.add_column("GB on the device")
    for r in rows:
        out.add_column(r["title"], justify="right")
    for kind in dict.fromkeys(k for r in rows for k in r["bytes"]):
        out.add_row(kind, *(f"{r['bytes'].get(kind, 0) / 1e9:,.2f}" for r in rows))
    out.add_section()
    out.add_row("total", *(f"{r['total'] / 1e9:,.2f}" for r in rows))
    fits = ("yes" if r["total"] <= GPU else "no" for r in rows)
    out.add_row(f"under {GPU / 1e9:.0f} GB", *fits)
    if any(r["host"] for r in rows):
        out.add_row("on the host", *(f"{r['host'] / 1e9:,.2f}" for r in rows))
    return out
