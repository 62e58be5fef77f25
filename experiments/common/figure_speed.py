"""Tables of time and memory: beside HF PEFT, of subspaces and many tasks, of large models."""

from __future__ import annotations

import statistics
from typing import Any

from experiments.common.figure_parts import markdown, read, score, source

# Of a row that several runs have, the last one's stands.
PEERS = ("two_core_cpu", "two_core_cpu_bf16")


def peers() -> str:
    """`bench_peers` on a CPU."""
    results = [read("bench_peers", name) for name in PEERS]
    found = {_row_name(row): row for r in results for row in r["rows"]}
    rows = [
        [
            name,
            f"{row['tokens_per_second']['jpeft']:,.0f}",
            f"{row['tokens_per_second']['peft']:,.0f}",
            _spread(row["ratio_low"], row["ratio"], row["ratio_high"]),
            _spread(*row["tuned_ratio"]),
            f"{1 / row['mfu']['peft_tuned']:.2f}",
            f"{row['eval']['ratio']:.2f}, {row['eval']['tuned_ratio'][1]:.2f}",
            f"{row['memory_ratio']:.2f}, {row['tuned_memory_ratio']:.2f}",
        ]
        for name, row in found.items()
    ]
    header = ["row", "jpeft, tokens/s", "HF PEFT, tokens/s", "ratio", "to `tuned`", "products"]
    about = "; ".join(dict.fromkeys(map(source, results)))
    return markdown([*header, "evaluation", "memory"], rows) + f"\n\n{about}."


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['method']}, {row['precision']}, {row['shape']}"


def _spread(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def peers_gpu() -> str:
    """`bench_peers` on a GPU."""
    r = read("bench_peers", "h200")
    rows = [
        [
            f"{_row_name(row)}: {what}",
            *(f"{speed['tokens_per_second'][side]:,.0f}" for side in SIDES),
            f"{speed['ratio']:.2f}",
            f"{speed['compiled_ratio'][1]:.2f}",
        ]
        for row in r["rows"]
        for what, speed in (
            ("training", row),
            ("evaluation", row["eval"]),
            (f"generation, {row['generation_shape']}", row["generation"]),
        )
    ]
    header = ["row, tokens/s", "jpeft", "HF PEFT", "HF PEFT compiled", "ratio", "to compiled"]
    return f"{markdown(header, rows)}\n\n{_of_the_step(r['rows'][0])}; {source(r)}."


SIDES = ("jpeft", "peft", "peft_compiled")


def _of_the_step(row: dict[str, Any]) -> str:
    mfu = ", ".join(f"{100 * row['mfu'][side]:.0f}%" for side in SIDES)
    profile = row["profile"]
    whole = sum(profile.values())
    parts = ", ".join(f"{kind} {100 * ms / whole:.0f}%" for kind, ms in profile.items())
    return (
        f"MFU {mfu} of the card's {row['matrix_flops_per_second'] / 1e12:,.0f} Tflop/s in a "
        f"product of random matrices; peak memory of a step {row['memory_ratio']:.2f} of the eager "
        f"peer's; of our step {parts}"
    )


def steps() -> str:
    """`bench_steps`: subspaces beside full fine-tuning, many tasks beside one."""
    r = read("bench_steps", "two_core_cpu")
    config = r["config"]
    rows = [
        [
            name,
            f"{x['ms']:.0f}",
            f"{x['ratio']:.2f}",
            f"{x['mib']:,.0f}",
            f"{x['memory_ratio']:.2f}",
        ]
        for name, x in r["training"].items()
    ]
    first = next(iter(r["training"]))
    header = ["training step", "ms", f"time over {first}'s", "MiB", f"memory over {first}'s"]
    mixed = [
        [name, f"{x['single_ms']:.0f}", f"{x['mixed_ms']:.0f}", f"{x['ratio']:.2f}"]
        for name, x in r["many_tasks"].items()
    ]
    tasks = f"{config['tasks']} tasks in the batch"
    second = ["forward pass", "one task, ms", f"{tasks}, ms", "throughput ratio"]
    shape = f"batch {config['batch']} x {config['length']}"
    return f"{markdown(header, rows)}\n\n{markdown(second, mixed)}\n\n{shape}; {source(r)}."


def account(result: str = "65b") -> str:
    """`qlora --report-65b`: the memory of large models' steps on one device."""
    r = read("qlora", result)
    rows = [
        [
            row["model"],
            row["title"],
            *(f"{row['bytes'].get(k, 0) / 1e9:.2f}" for k in ("frozen", "trainable", "optimiser")),
            f"{row['bytes']['temporaries'] / 1e9:.2f}",
            f"{row['total'] / 1e9:.2f}",
            f"{row['host'] / 1e9:.2f}",
        ]
        for row in r["rows"]
    ]
    header = ["model", "optimiser", "base, GB", "trained", "state", "temporaries", "in all"]
    first = r["rows"][0]
    tpu = r["topology"].startswith("v")
    name = "libtpu" if tpu else "jax-cuda12-plugin"
    by = f"{'libtpu' if tpu else 'the CUDA plugin'} {r['versions'][name]}"
    about = (
        f"NF4 with double quantisation, rank {first['rank']} on every linear layer, 1 x "
        f"{first['sequence']} tokens, activations made again; one device of {r['topology']}, {by}, "
        f"{source(r)}."
    )
    return f"{markdown([*header, 'on the host, GB'], rows)}\n\n{about}"


def account_gpu() -> str:
    """The same on a GPU of 48 GB."""
    return account("65b_a6000")


def bases() -> str:
    """`qlora` on SST-2: one adapter on bases in several formats."""
    r = read("qlora", "sst2")
    rows = [
        [
            name,
            score(row),
            f"{row['base_mib']:.0f}",
            f"{row['memory_mib']:,.0f}",
            f"{row['step_ms']:,.0f}",
        ]
        for name, row in r["rows"].items()
    ]
    c = r["config"]
    metric = next(iter(r["rows"].values()))["metric"]
    header = ["base", f"{metric}, %", "MiB of the base", "MiB a step", "ms a step"]
    epochs = "1 epoch" if c["epochs"] == 1 else f"{c['epochs']} epochs"
    return f"{markdown(header, rows)}\n\n{c['seeds']} seeds, {epochs}; {source(r)}."


def large() -> str:
    """`bench_large`: steps of large models with random weights on one GPU."""
    names = ("llama_65b_qlora_48gb", "llama_8b_qlora", "llama_8b_lora", "llama_1b_lora")
    results = [read("bench_large", name) for name in names]
    rows = [
        [
            f"{c['model']}, {c['quantize'] or 'bf16'}, rank {c['rank']}",
            f"{c['batch']} x {c['sequence']}",
            f"{r['held_bytes']['frozen'] / 1e9:.2f}",
            f"{r['peak_bytes'] / 1e9:.2f}",
            f"{r['limit_bytes'] / 1e9:.1f}",
            f"{1e3 * statistics.median(r['step_seconds']):,.0f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{100 * r['mfu']:.0f}%",
        ]
        for r in results
        for c in [r["config"]]
    ]
    header = ["model", "tokens", "base, GB", "peak", "limit", "ms a step", "tokens/s", "MFU"]
    first = results[0]["config"]
    about = (
        f"LoRA on every linear layer, {first['steps']} optimiser steps each. Of the first, "
        "activations are made again, trained arrays are bf16 rounded at random and moments in 8 "
        f"bits; the peak counts the drawing of the weights; {source(results[0])}."
    )
    return f"{markdown(header, rows)}\n\n{about}"
