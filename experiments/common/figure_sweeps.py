"""The README's tables of sweeps: LoRA's ranks, random subspaces, and methods by a model's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.common.by_size_shown import NAMES
from experiments.common.dimensions import KINDS, hollow
from experiments.common.figure_parts import markdown, read, score, source
from experiments.common.plots import seeds
from experiments.lora_rank import PAPER


def ranks() -> str:
    """`lora_rank` on two tasks, beside the paper's."""
    results = {task: read("lora_rank", task.lower().replace("-", "")) for task in ("SST-2", "MNLI")}
    shown = sorted({int(r) for x in results.values() for by in x["scores"].values() for r in by})
    rows: list[list[str]] = []
    for task, r in results.items():
        for weights, by in r["scores"].items():
            cells = [score(by[str(n)]) if str(n) in by else "" for n in shown]
            rows.append([f"{task}: {weights}", *cells])
    for task, table in PAPER.items():
        for weights, by in table.items():
            cells = [f"{by[n]:.1f}" if n in by else "" for n in shown]
            rows.append([f"{task}, GPT-3 175B (Hu et al. 2021): {weights}", *cells])
    header = ["score, %", *(f"r {n}" for n in shown)]
    about = "; ".join(f"{task}: {_run(r)}" for task, r in results.items())
    return f"{markdown(header, rows)}\n\n{about}; {source(results['SST-2'])}."


def _run(r: dict[str, Any]) -> str:
    c = r["config"]
    return f"{seeds(c['seeds'])}, {c['epochs']} epoch{'s' if c['epochs'] > 1 else ''}"


def _reached(d90: int | None, dims: Sequence[int]) -> str:
    """Where d90 lies between the dimensions that were tried."""
    if d90 is None:
        return f"more than {max(dims):,}"
    below = [d for d in dims if d < d90]
    return f"{max(below):,} to {d90:,}" if below else f"at most {d90:,}"


def dimension() -> str:
    """`intrinsic_dimension` on MRPC."""
    r = read("intrinsic_dimension", "mrpc")
    empty = hollow("accuracy", r["constant"], r["full"]["mean"])
    dims = sorted({int(d) for by in r["scores"].values() for d in by})
    rows = [
        [
            kind,
            *(score(r["scores"][kind][str(d)]) for d in dims),
            score(r["full"]),
            "" if empty else _reached(r["d90"][kind], dims),
        ]
        for kind in KINDS
    ]
    header = ["accuracy, %", *(f"d = {d:,}" for d in dims), "full", "d90"]
    note = (
        f"90% of full is {90 * r['full']['mean']:.1f}, the largest class {100 * r['constant']:.1f}"
    )
    return f"{markdown(header, rows)}\n\n{note}; {_run(r)}; {source(r)}."


def sizes() -> str:
    """`by_size --kind methods` on SST-2."""
    r = read("by_size", "sst2_methods")
    names: list[str] = list(dict.fromkeys(str(n) for m in r["models"] for n in m["scores"]))
    rows = [
        [
            f"{m['parameters']:,}",
            *(score(m["scores"][n]) if n in m["scores"] else "" for n in names),
        ]
        for m in r["models"]
    ]
    header = ["parameters", *(NAMES.get(n, n.replace("prompt_", "prompt of ")) for n in names)]
    return f"{markdown(header, rows)}\n\nAccuracy, %; {_run(r)}; {source(r)}."


def dimension_by_size() -> str:
    """`by_size --kind intrinsic_dimension` on SST-2."""
    r = read("by_size", "sst2_dimension")
    rows: list[list[str]] = []
    dims = sorted({int(d) for m in r["models"] for k in KINDS for d in m["scores"][k]})
    for m in r["models"]:
        for kind in KINDS:
            by = m["scores"][kind]
            cells = [score(by[str(d)]) if str(d) in by else "" for d in dims]
            last = _reached(m["d90"][kind], [int(d) for d in by])
            rows.append([f"{m['parameters']:,}", kind, *cells, score(m["full"]), last])
    header = ["parameters", "kind", *(f"d = {d:,}" for d in dims), "full", "d90"]
    return f"{markdown(header, rows)}\n\nAccuracy, %; {_run(r)}; {source(r)}."
