"""A comparison as terminal tables, and as a plot of its ratios."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.peer_measure import Row, Speed
from experiments.common.peers import COMPILED, EAGER, OURS
from experiments.common.plots import COLOURS, figure

# What a column says of the peer that has our setting of the allocator.
ALIKE = "its allocator as ours"
# Ratios that the plot's axis names.
MARKS = (0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 40)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Training; the forward pass and generation; memory; the time to the first step; the profile,
    where there is one.
    """
    if not rows:
        return []
    out = [training(rows), forward(rows), memory(rows), starts(rows)]
    return [*out, profiles(rows)] if any(r.profile for r in rows) else out


def training(rows: Sequence[Row]) -> Table:
    """Speeds and ratios, and on a GPU the share of its rate."""
    mfu, compiled = any(r.mfu for r in rows), any(r.compiled_ratio for r in rows)
    tuned = any(r.tuned_ratio for r in rows)
    names = ["tokens/s", "ratio", "lowest to highest"]
    names += (
        ([ALIKE] if tuned else [])
        + (["to compiled"] if compiled else [])
        + (["MFU, %"] if mfu else [])
    )
    out = _table(f"training, {OURS} / HF PEFT: medians, ratios within rounds", names)
    for r in rows:
        span = f"{r.ratio_low:.2f} to {r.ratio_high:.2f}"
        cells = [both(r.tokens_per_second), f"{r.ratio:.2f}", span]
        if tuned:
            cells.append(f"{r.tuned_ratio[1]:.2f}" if r.tuned_ratio else "")
        if compiled:
            cells.append(f"{r.compiled_ratio[1]:.2f}" if r.compiled_ratio else "")
        if mfu:
            cells.append(both({k: 100 * v for k, v in r.mfu.items()}, ".0f") if r.mfu else "")
        out.add_row(title(r, "\n"), *cells)
    return out


def forward(rows: Sequence[Row]) -> Table:
    """Evaluation and generation."""
    generated = any(r.generation for r in rows)
    names = ["evaluation", "ratio", *(["generation", "ratio"] if generated else [])]
    out = _table(f"tokens/s without gradients, {OURS} / HF PEFT", names)
    for r in rows:
        out.add_row(title(r, "\n"), *_speed(r.eval), *(_speed(r.generation) if generated else []))
    return out


def memory(rows: Sequence[Row]) -> Table:
    """The peak of a step, and what our compiled step states."""
    tuned = any(r.tuned_memory_ratio for r in rows)
    names = [
        "peak MiB",
        "ratio",
        *([ALIKE] if tuned else []),
        f"{OURS}'s arguments and temporaries",
    ]
    out = _table(f"memory of a training step, {OURS} / HF PEFT", names)
    for r in rows:
        ratio = f"{r.memory_ratio:.2f}" if r.memory_ratio else ""
        program = f"{r.program_mib:,.0f}" if r.program_mib is not None else ""
        alike = f"{r.tuned_memory_ratio:.2f}" if r.tuned_memory_ratio else ""
        cells = [ratio, *([alike] if tuned else []), program]
        out.add_row(title(r, "\n"), both(r.memory_mib), *cells)
    return out


def starts(rows: Sequence[Row]) -> Table:
    """Seconds to the first step: to import, to load, and the step itself."""
    names = [s for s in (OURS, "jpeft_warm", EAGER, COMPILED) if any(s in r.start for r in rows)]
    shown = {OURS: f"{OURS}, compiling", "jpeft_warm": f"{OURS}, compiled before"}
    about = "seconds to the first step: import + load + first step"
    out = _table(about, [shown.get(name, name) for name in names])
    for r in rows:
        out.add_row(title(r, "\n"), *(_start(r.start[s]) if s in r.start else "" for s in names))
    return out


def profiles(rows: Sequence[Row]) -> Table:
    """Where our step's time goes."""
    traced = [r for r in rows if r.profile]
    kinds = list(dict.fromkeys(k for r in traced for k in r.profile or {}))
    out = _table(f"milliseconds of {OURS}'s training step", [*kinds, "in all"])
    for r in traced:
        ms = r.profile or {}
        total = sum(ms.values())
        cells = [f"{ms[k]:,.1f}\n{100 * ms[k] / total:.0f}%" if total else "" for k in kinds]
        out.add_row(title(r, "\n"), *cells, f"{total:,.1f}")
    return out


def _table(about: str, names: Sequence[str]) -> Table:
    out = Table(title=about)
    out.add_column("row", no_wrap=True)
    for name in names:
        out.add_column(name, justify="right")
    return out


def title(row: Row, between: str = " ") -> str:
    """What a row is, in few words, with `between` in their middle."""
    return f"{row.model} {row.method}{between}{row.precision} {row.shape}"


def both(of: Mapping[str, float | None], form: str = ",.0f") -> str:
    """Ours and the eager peer's."""
    found = [of.get(side) for side in (OURS, EAGER)]
    return " / ".join("-" if x is None else format(x, form) for x in found)


def _speed(speed: Speed | None) -> list[str]:
    return ["", ""] if speed is None else [both(speed.tokens_per_second), f"{speed.ratio:.2f}"]


def _alike(row: Row) -> Speed | None:
    if row.tuned_ratio is None:
        return None
    low, middle, high = row.tuned_ratio
    return Speed({}, middle, low, high)


def _start(parts: Mapping[str, float]) -> str:
    return f"{sum(parts.values()):.1f} = " + " + ".join(f"{s:.1f}" for s in parts.values())


def draw(out: pathlib.Path | None, rows: Sequence[Row], source: str, console: Console) -> None:
    """Bars of the ratios, with their ranges, from a line where the sides are equal."""
    size = (7.0, 1.6 + 0.55 * len(rows))
    with figure(out, "bench_peers", source, console, size) as axes:
        if axes is None:
            return
        parts: list[tuple[str, list[Speed | None]]] = [
            ("training", [Speed({}, r.ratio, r.ratio_low, r.ratio_high) for r in rows]),
            (f"training, {ALIKE}", [_alike(r) for r in rows]),
            ("evaluation", [r.eval for r in rows]),
            ("generation", [r.generation for r in rows]),
        ]
        parts = [p for p in parts if any(p[1])]
        height = 0.8 / len(parts)
        for i, (name, found) in enumerate(parts):
            at = [(j + (i - (len(parts) - 1) / 2) * height, s) for j, s in enumerate(found) if s]
            axes.barh(
                [y for y, _ in at],
                [s.ratio - 1 for _, s in at],
                height,
                left=1,
                xerr=[
                    [s.ratio - s.ratio_low for _, s in at],
                    [s.ratio_high - s.ratio for _, s in at],
                ],
                color=COLOURS[i],
                error_kw={"ecolor": "0.3", "capsize": 2, "linewidth": 0.8},
                label=name,
            )
        axes.axvline(1.0, color="0.2", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [title(r) for r in rows])
        axes.invert_yaxis()
        # Twice as fast is as far from the line as half as fast.
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.95), max(high, 1.05))
        marks = [x for x in MARKS if low < x < high or x == 1]
        axes.set_xticks(marks, [f"{x:g}" for x in marks])
        axes.minorticks_off()
        axes.set_xlabel(f"{OURS}'s tokens/s over HF PEFT's (lines: lowest to highest round)")
        axes.set_ylabel("model and row")
        columns = min(len(parts), 3)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=columns)
        axes.grid(alpha=0.3, axis="x")


def source_of(result: Mapping[str, Any]) -> str:
    """Machine, versions and date in a line."""
    machine, versions = result["machine"], result["versions"]
    where = machine["processor"] if machine["platform"] == "cpu" else machine["devices"][0]
    names = [n for n in ("jax", "torch", "transformers", "peft") if n in versions]
    told = ", ".join(f"{n} {versions[n]}" for n in names)
    return f"{where}, {machine['cores']} cores; {told}; {machine['date']}"
