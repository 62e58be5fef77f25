"""The cost of attention against the length of the text: whole, and shifted in groups (LongLoRA).

Flops and memory of one row's attention, forward and backward, as the compiled program states them:
nothing is run, so that no length is too long.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.command import command, ready
from experiments.common.options import at_least, one_or_more
from experiments.common.plots import COLOURS, figure, made_on
from experiments.common.report import describe_machine, versions, write_json

KINDS = ("full", "shifted")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile."""

    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    """Tokens in the row."""
    group: int = 2048
    """Tokens in a group of the shifted attention."""
    heads: int = 4
    """Heads; keys and values have as many."""
    width: int = 64
    """Of a head."""
    out: pathlib.Path | None = None
    """Folder for `result.json` and the plot."""
    overwrite: bool = False
    """Throw away the result that --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Compile, print and write."""
    console = console or Console()
    one_or_more(config, "lengths")
    at_least(config, lengths=1, group=2, heads=1, width=1)
    ready(config.out, config.overwrite)
    rows = {kind: {str(t): cost(config, kind, t) for t in sorted(config.lengths)} for kind in KINDS}
    result = {
        "config": dataclasses.asdict(config) | {"out": None},
        "rows": rows,
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(table(config, rows))
    if config.out is not None:
        write_json(config.out / "result.json", result)
    draw(config, result, console)
    return result


def cost(config: Config, kind: str, t: int) -> dict[str, float]:
    """`flops`, and `bytes` of temporaries, of attention and its gradient over `t` tokens."""
    import jax
    import jax.numpy as jnp

    from jpeft.models.causal import causal_attention, may_read
    from jpeft.models.shifted import shifted_attention

    scale = config.width**-0.5

    def attend(q: Any, k: Any, v: Any, positions: Any) -> Any:
        if kind == "shifted":
            return shifted_attention(q, k, v, positions, group=config.group, scale=scale)
        return causal_attention(q, k, v, may_read(positions, positions), scale=scale)

    def loss(q: Any, k: Any, v: Any, positions: Any) -> Any:
        return jnp.sum(attend(q, k, v, positions).astype(jnp.float32) ** 2)

    row = jax.ShapeDtypeStruct((1, t, config.heads, config.width), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, t), jnp.int32)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = step.lower(row, row, row, positions).compile()
    analysis: Any = compiled.cost_analysis()
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "flops": float((analysis if isinstance(analysis, dict) else analysis[0])["flops"]),
        "bytes": float(memory.temp_size_in_bytes),
    }


def table(config: Config, rows: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Lengths down, flops and memory of each kind across."""
    out = Table(title=f"attention and its gradient, groups of {config.group:,}")
    out.add_column("tokens", justify="right")
    for kind in KINDS:
        out.add_column(f"{kind}, Gflop", justify="right")
        out.add_column(f"{kind}, MiB", justify="right")
    for t in sorted(config.lengths):
        cells = [rows[kind][str(t)] for kind in KINDS]
        shown = [(f"{c['flops'] / 1e9:,.1f}", f"{c['bytes'] / 2**20:,.0f}") for c in cells]
        out.add_row(f"{t:,}", *(x for pair in shown for x in pair))
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Flops against length, both axes logarithmic."""
    with figure(config.out, "attention_cost", f"compiled for {made_on(result)}", console) as axes:
        if axes is None:
            return
        lengths = sorted(config.lengths)
        for colour, kind in zip(COLOURS, KINDS, strict=False):
            y = [result["rows"][kind][str(t)]["flops"] / 1e9 for t in lengths]
            axes.plot(lengths, y, marker="o", color=colour, label=kind)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else str(t) for t in lengths])
        axes.set_xlabel("tokens in the row")
        axes.set_ylabel("Gflop of attention and its gradient")
        axes.legend(title=f"attention (groups of {config.group:,})", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(command("attention_cost", Config, main, __doc__))
