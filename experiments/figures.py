"""Write the figures of committed results into the README, between its markers.

A marker is `<!-- figures: NAME -->`, and what follows it up to `<!-- end -->` is replaced by the
table NAME of the files under docs/results. `--check` changes nothing, and fails where they differ.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable

import tyro

from experiments.common.figure_parts import ROOT, FiguresError, markdown, read, score, source
from experiments.common.figure_speed import (
    account,
    account_gpu,
    bases,
    large,
    peers,
    peers_gpu,
    steps,
)
from experiments.common.figure_sweeps import dimension, dimension_by_size, ranks, sizes
from experiments.step_cost import what as step_in_words


@dataclasses.dataclass(frozen=True)
class Config:
    """Which page."""

    page: pathlib.Path = ROOT / "README.md"
    """The page to write into."""
    check: bool = False
    """Only tell whether the page is as the results are."""


def glue() -> str:
    """`lora_glue` on four tasks."""
    rows: list[list[str]] = []
    results = {n: read("lora_glue", f"{n}_lora") for n in ("sst2", "mrpc", "cola", "rte")}
    full = read("lora_glue", "sst2_full")
    for name, r in results.items():
        metric = next(iter(r["metrics"]["lora"]))
        cells = [score(r["metrics"][k][metric]) for k in r["metrics"]]
        whole = score(full["metrics"]["full"][metric]) if name == "sst2" else ""
        seeds = str(len(r["seeds"]))
        rows.append([f"{name.upper()}, {metric}", cells[0], whole, *cells[1:], seeds])
    header = ["task", "LoRA r 8", "full", "head on frozen encoder", "majority class", "seeds"]
    return markdown(header, rows) + f"\n\n{source(results['sst2'])}."


def methods(task: str = "sst2") -> str:
    """`compare_methods`: every method on one task."""
    r = read("compare_methods", task)
    config = r["config"]
    rows = [
        [
            method,
            score(row),
            f"{row['trained']:,}",
            f"{row['step_ms']:.0f}",
            f"{row['memory_mib']:,.0f}",
        ]
        for method, row in sorted(r["rows"].items(), key=lambda item: -item[1]["mean"])
    ]
    header = ["method", "accuracy", "trained parameters", "ms a step", "MiB a step"]
    about = f"{config['seeds']} seeds, {config['epochs']} epochs"
    return f"{markdown(header, rows)}\n\n{about}; {source(r)}."


def attention() -> str:
    """`attention_cost`: whole and shifted attention by length."""
    r = read("attention_cost")
    rows: list[list[str]] = []
    for t in r["config"]["lengths"]:
        cells = [r["rows"][kind][str(t)] for kind in ("full", "shifted")]
        shown = [f"{x['flops'] / 1e9:,.0f}" for x in cells]
        rows.append([f"{t:,}", *shown, *(f"{x['bytes'] / 2**20:,.0f}" for x in cells)])
    header = ["tokens", "full, Gflop", "shifted, Gflop", "full, MiB", "shifted, MiB"]
    c = r["config"]
    about = f"One row, {c['heads']} heads of {c['width']}, bf16, groups of {c['group']:,}"
    return f"{markdown(header, rows)}\n\n{about}, with the gradient; compiled on {source(r)}."


def generation() -> str:
    """`bench_generation` on a model of 260K parameters."""
    r = read("bench_generation", "stories260k")
    header = ["generation", "ms", "ratio"]
    rows = [
        ["with a cache", f"{r['cached_ms']:.0f}", f"{r['ratio']:.1f}"],
        ["without", f"{r['plain_ms']:,.0f}", "1.0"],
    ]
    tokens = r["config"]["tokens"]
    return f"{markdown(header, rows)}\n\n{tokens} tokens, stories260K, fp32; {source(r)}."


def longlora() -> str:
    """`longlora`: perplexity by context."""
    r = read("longlora", "stories260k")
    lengths = [str(n) for n in r["sizes"]["lengths"]]
    rows = [
        [
            name,
            *(f"{row['perplexity'][n]:.2f}" for n in lengths),
            *(f"{row[k]:,.0f}" if k in row else "" for k in ("trained", "ms", "mib")),
        ]
        for name, row in r["rows"].items()
    ]
    header = ["variant", *(f"{n} tokens" for n in lengths), "trained", "ms a step", "MiB"]
    c = r["config"]
    about = f"stories260K on novels, {c['steps']} steps of {c['batch']} x {r['sizes']['length']}"
    return f"{markdown(header, rows)}\n\n{about}, 1 seed; {source(r)}."


def finetune() -> str:
    """`finetune` of stories260K on E2E."""
    results = {n: read("finetune", f"e2e_{n}") for n in ("lora", "full")}
    rows = [
        [
            name,
            f"{r['trained']:,}",
            f"{r['held_out']['loss_before']:.3f}",
            f"{r['held_out']['loss']:.3f}",
            f"{r['scores']['bleu']:.1f}",
        ]
        for name, r in results.items()
    ]
    header = ["method", "trained parameters", "loss before", "loss", "BLEU"]
    r = results["lora"]
    c = r["config"]
    about = f"{c['limit']:,} pairs, {c['epochs']} epochs, BLEU of {c['generate']} meanings"
    return f"{markdown(header, rows)}\n\n{about}, {c['beams']} beams; {source(r)}."


def aot() -> str:
    """`aot`: steps compiled for slices and hosts that are not there."""
    names = (
        "llama-3-8b_lora_v5e-16x16",
        "llama-3-70b_full_v5p-8x8x8",
        "llama-3-70b_full_v5p-8x8x8_data-8",
        "llama-3-8b_full_h100-1x8",
        "llama-3-70b_full_h100-8x8",
    )
    rows: list[list[str]] = []
    results = [read("aot", n) for n in names]
    for r in results:
        c, found, e = r["config"], r["bytes_per_device"], r["estimate"]
        rows.append(
            [
                f"{c['model']}, {c['method']}",
                f"{c['topology']}, {c['mesh'] or 'all on fsdp'}",
                f"{c['batch']:,} x {c['sequence']:,}",
                f"{found['total'] / 2**30:.1f} of {found['limit'] / 2**30:.1f}",
                f"{e['step_seconds']:.2f}",
                f"{100 * e['mfu']:.0f}%",
                f"{r['wall_seconds']:.0f}",
            ]
        )
    header = ["model, method", "devices, mesh", "batch", "GiB on each", "least s a step"]
    tpu, gpu = results[0], results[-1]
    about = (
        f"Stage 3, bf16, activations made again; TPUs: libtpu {tpu['versions']['libtpu']}, "
        f"{source(tpu)}; GPUs: the CUDA plugin {gpu['versions']['jax-cuda12-plugin']}, "
        f"{source(gpu)}."
    )
    return f"{markdown([*header, 'MFU at most', 's to compile'], rows)}\n\n{about}"


def memory(name: str = "check") -> str:
    """`memory --check`: predicted from shapes, and compiled."""
    r = read("memory", name)
    rows = [
        [
            row["title"],
            f"{row['predicted_total'] / 1e9:.2f}",
            f"{row['measured_peak'] / 1e9:.2f}",
            f"{100 * row['error']:+.1f}%",
        ]
        for row in r["rows"]
    ]
    header = ["step", "predicted, GB", "compiled, GB", "error"]
    about = f"On a device of {r['topology']}, the most at once; {source(r)}."
    return f"{markdown(header, rows)}\n\n{about}"


def memory_parts() -> str:
    """`memory --check-parts`: layers split over devices, and batches in parts."""
    return memory("check_parts")


def precision() -> str:
    """`precision` on SST-2."""
    r = read("precision", "sst2")
    rows = [
        [
            name,
            f"{row['loss']:.4f}",
            f"{row['over_float32']:.3f}",
            f"{100 * row['scores']['accuracy']:.1f}",
            f"{100 * row['moved']:.1f}%",
        ]
        for name, row in r["rows"].items()
    ]
    header = ["precision", "loss, last 50 steps", "over float32's", "accuracy", "moved by a step"]
    c = r["config"]
    about = f"SST-2, {c['steps']} steps of {c['batch']}, rate {c['lr']:g}, 1 seed; {source(r)}."
    return f"{markdown(header, rows)}\n\n{about}"


def sample() -> str:
    """The main job: the sample by this package's encoder, and by it before it was pre-trained."""
    results = {n: read("lora_glue", f) for n, f in (("", "sample"), (" drawn", "sample_untrained"))}
    rows: list[list[str]] = []
    for name, r in results.items():
        scores = [score(r["metrics"][m]["accuracy"]) for m in r["metrics"]]
        rows.append([f"the encoder{' with its numbers' if name else ''}{name}", *scores])
    r = results[""]
    about = f"{len(r['seeds'])} seeds, {r['config']['epochs']} epochs; {source(r)}."
    header = ["accuracy, %", "LoRA r 8", "head on frozen encoder", "majority class"]
    return f"{markdown(header, rows)}\n\n{about}"


def slopes() -> str:
    """`step_cost`: a step's time against its sizes, and its flops'."""
    r = read("step_cost", "two_core_cpu")
    rows: list[list[str]] = []
    for name, found in r["axes"].items():
        values, (low, high) = list(found["values"]), found["slope_range"]
        ends = [f"{found['values'][v]['ms']:,.0f}" for v in (values[0], values[-1])]
        measured = f"{found['slope']:.2f} ({low:.2f} to {high:.2f})"
        spans = (f"{int(values[0]):,} to {int(values[-1]):,}", " to ".join(ends))
        rows.append([name, *spans, measured, f"{found['theory']:.2f}"])
    header = ["what is changed", "from, to", "ms a step", "slope (range)", "slope of flops"]
    return f"{markdown(header, rows)}\n\n{step_in_words(r['config'])}; {source(r)}."


def families() -> str:
    """`pretrain`: losses by size, and by what an encoder starts from."""
    results = [read("pretrain", n) for n in ("small", "novels", "h200")]
    rows = [
        [
            f"{m['family']}, {m['shape']['layers']} x {m['shape']['width']}",
            f"{m['parameters']:,}",
            ", ".join(m.get("starts") or ()) or "drawn",
            f"{m['tokens'] / 1e6:.1f}M",
            f"{m['validation'][str(m['steps'])]:.2f}",
            f"{m['tokens_per_second']:,.0f}",
        ]
        for r in results
        for m in r["models"]
    ]
    header = ["layers x width", "parameters", "start", "tokens", "nats a label", "tokens/s"]
    own, others = source(results[0]), source(results[-1])
    about = f"The first three on {own}; the others, two at once, on {others}."
    return f"{markdown(header, rows)}\n\n{about}"


TABLES: dict[str, Callable[[], str]] = {
    "precision": precision,
    "aot": aot,
    "memory": memory,
    "memory_parts": memory_parts,
    "glue": glue,
    "peers": peers,
    "peers_gpu": peers_gpu,
    "steps": steps,
    "methods": methods,
    "methods_mrpc": functools.partial(methods, "mrpc"),
    "attention": attention,
    "generation": generation,
    "longlora": longlora,
    "finetune": finetune,
    "account": account,
    "account_gpu": account_gpu,
    "large": large,
    "bases": bases,
    "sample": sample,
    "slopes": slopes,
    "families": families,
    "ranks": ranks,
    "dimension": dimension,
    "dimension_by_size": dimension_by_size,
    "sizes": sizes,
}


def filled(text: str) -> str:
    """A page with its tables made again. **Raises:** `FiguresError` for an unknown one."""

    def table(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise FiguresError(f"there is no table '{name}': there are {', '.join(TABLES)}")
        return f"<!-- figures: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(config: Config) -> int:
    """Write, or with `check` compare: 0, or 1 where they differ."""
    old = config.page.read_text(encoding="utf-8")
    new = filled(old)
    if config.check:
        return int(old != new)
    config.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config, description=__doc__)))
    except FiguresError as e:
        sys.exit(f"figures: {e}")
