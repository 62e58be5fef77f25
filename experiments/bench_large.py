"""Training steps of a large decoder with random weights on one device: memory, tokens/s, MFU.

Weights are drawn, and with `--quantize` quantised, layer by layer on the device: the model never
stands there whole in more bits. To see that a step fits a smaller device, limit the allocator:
`XLA_PYTHON_CLIENT_MEM_FRACTION` is what of the device's memory it may take.

Without arguments: Llama-3.2-1B in NF4, LoRA on every linear layer.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.command import command, ready
from experiments.common.methods import Method, Sizes
from experiments.common.numbers import Keep, Optimiser, Precision, Quantised
from experiments.common.report import describe_machine, versions, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the method and the batch."""

    model: str = "llama-3.2-1b"
    """A published model's name (experiments/common/named.py), a directory, or a config.json."""
    method: Method = "lora"
    """What is trained."""
    quantize: Quantised | None = "nf4"
    """Frozen weights of linear layers in this format; None leaves them in bf16."""
    rank: int = 64
    """LoRA's rank."""
    targets: tuple[str, ...] = (r"_proj/kernel$",)
    """LoRA's targets."""
    precision: Precision = "bfloat16"
    """As finetune's."""
    optimiser: Optimiser = "adamw"
    """AdamW with moments in float32, or in 8 bits."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between steps."""
    batch: int = 1
    """Rows."""
    sequence: int = 512
    """Tokens of a row."""
    steps: int = 10
    """Optimiser steps that are timed, after two that are not."""
    remat: bool = True
    """Forget each layer's activations and compute them again in the backward pass."""
    keep: Keep = "nothing"
    """What --remat keeps of a layer."""
    chunk: int = 1024
    """Tokens whose logits are made at a time."""
    out: pathlib.Path | None = None
    """Folder for result.json."""
    overwrite: bool = False
    """Throw away the result that --out holds."""

    # What `experiments.common.plan` asks for besides.
    stage = 0
    accumulate = 1

    @property
    def numbers(self) -> Precision:
        """The precision, by the plan's name."""
        return self.precision

    @property
    def sizes(self) -> Sizes:
        """What the method is built from."""
        return Sizes(rank=self.rank, targets=self.targets)


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Make the model, train, print and write.

    **Raises:** `ValueError`, `ModelError` for what there is not.
    """
    console = console or Console()
    if min(config.steps, config.batch, config.sequence) < 1:
        raise ValueError("--steps, --batch and --sequence are at least 1")
    ready(config.out, config.overwrite)
    measured = run(config, console)
    result = {
        "config": dataclasses.asdict(config) | {"out": None},
        **measured,
        "limit_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(table(config, result))
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def run(config: Config, console: Console) -> dict[str, Any]:
    """Bytes and seconds of the steps."""
    import jax
    import numpy as np

    from experiments.common.decoders import LAYOUTS
    from experiments.common.peer_flops import LARGE
    from experiments.common.peer_ours import matrix_rate
    from experiments.common.plan import plan
    from experiments.common.random_base import random_params
    from jpeft.models.llama import Llama
    from sharding import make_mesh

    device = jax.local_devices()[0]
    gpu = device.platform in ("gpu", "cuda")
    planned = plan(config, make_mesh({"fsdp": 1}, [device]), "cudnn" if gpu else None)
    begun = time.perf_counter()
    with console.status(f"{config.model}: {planned.parameters / 1e9:.1f}B parameters are drawn"):
        key = jax.random.key(0)
        params = random_params(
            key, planned.dense, LAYOUTS[Llama].linear, config.quantize, planned.uses
        )
        trainable = planned.first(jax.random.key(1), params)
        frozen = planned.frozen_of(params, trainable)
        state = planned.step.init(trainable)
        del params, trainable
        jax.block_until_ready((frozen, state))
    drawn = time.perf_counter() - begun
    rng = np.random.default_rng(0)
    shape = (config.batch, config.sequence)
    ids = rng.integers(0, planned.config.vocab_size, shape).astype(np.int32)
    batch = {"input_ids": ids, "labels": ids}
    held = {name: sum(x.nbytes for x in jax.tree.leaves(tree)) for name, tree in (
        ("frozen", frozen), ("trained", state.trainable), ("optimiser", state.optimiser),
    )}  # fmt: skip
    begun = time.perf_counter()
    with console.status(f"{config.model}: the step is compiled"):
        compiled = planned.step.lower(state, frozen, batch, key).compile()
        memory: Any = compiled.memory_analysis()
    compiling = time.perf_counter() - begun
    times: list[float] = []
    losses: list[float] = []
    with console.status(f"{config.model}: {config.steps} steps"):
        for _ in range(config.steps + 2):
            begun = time.perf_counter()
            state, metrics = planned.step(state, frozen, batch, key)
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - begun)
    stats = device.memory_stats() or {}
    del state
    seconds = statistics.median(times[2:])
    flops = planned.model_flops(config.batch)
    rate = matrix_rate(*LARGE) if gpu else None
    return {
        "parameters": planned.parameters,
        "trained": planned.trained,
        "held_bytes": held,
        "program_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
        "drawn_seconds": drawn,
        "compile_seconds": compiling,
        "step_seconds": times[2:],
        "losses": losses,
        "tokens_per_second": config.batch * config.sequence / seconds,
        "flops_per_step": flops,
        "matrix_flops_per_second": rate,
        "mfu": None if rate is None else flops / seconds / rate,
    }


def table(config: Config, result: dict[str, Any]) -> Table:
    """What was measured, a line each."""
    out = Table(
        title=f"{config.model}, {result['parameters'] / 1e9:.2f}B parameters"
        + (f" in {config.quantize}" if config.quantize else "")
        + f", {config.method} ({result['trained'] / 1e6:,.0f}M trained), "
        f"{config.batch} x {config.sequence} tokens"
    )
    out.add_column("")
    out.add_column("", justify="right")
    for kind, size in (*result["held_bytes"].items(), *result["program_bytes"].items()):
        where = "held: " if kind in result["held_bytes"] else "step: "
        out.add_row(where + kind, f"{size / 1e9:,.2f} GB")
    if result["peak_bytes"] is not None:
        out.add_row("peak of the device, drawing counted", f"{result['peak_bytes'] / 1e9:,.2f} GB")
        out.add_row("the allocator's limit", f"{(result['limit_bytes'] or 0) / 1e9:,.2f} GB")
    out.add_row("compiling", f"{result['compile_seconds']:.1f} s")
    out.add_row("a step (median)", f"{1e3 * statistics.median(result['step_seconds']):,.0f} ms")
    out.add_row("tokens/s", f"{result['tokens_per_second']:,.0f}")
    if result["mfu"] is not None:
        out.add_row("MFU, of the measured matrix rate", f"{result['mfu']:.1%}")
    out.add_row("loss, first and last", f"{result['losses'][0]:.3f}, {result['losses'][-1]:.3f}")
    return out


if __name__ == "__main__":
    sys.exit(command("bench_large", Config, main, __doc__))
