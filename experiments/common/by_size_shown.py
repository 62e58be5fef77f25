"""Tables and plots of models by their size: scores, d90, and d90 along pre-training."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.dimensions import KINDS
from experiments.common.plots import COLOURS, figure, made_on, seeds

NAMES = {"full": "full fine-tuning", "fixed_prompt": "head alone", "prefix": "prefix"}


def title(model: Mapping[str, Any]) -> str:
    """Family, size and step."""
    step = model["step"]
    return f"{model['family']} {model['size']}" + ("" if step is None else f", step {step:,}")


def shown(score: Mapping[str, Any]) -> str:
    """Mean and deviation."""
    deviation = f" ± {score['std']:.4f}" if len(score["values"]) > 1 else ""
    return f"{score['mean']:.4f}{deviation}"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Scores with a row for each model; for d90 a table of them too."""
    head = f"{result['task']}, validation {result['metric']}"
    models = result["models"]
    if result["kind"] == "methods":
        names = list(dict.fromkeys(n for m in models for n in m["scores"]))
        return [_scores(f"{head}, by method", models, names, lambda m: m["scores"])]
    if result["kind"] == "lora_plus":
        return [_ratios(f"{result['task']}: LoRA+ by ratio of the rates of B and A", models)]
    out: list[Table] = []
    for kind in KINDS:
        dims = sorted({int(d) for m in models for d in m["scores"][kind]})
        names = [*(str(d) for d in dims), "full"]
        out.append(
            _scores(
                f"{head}, by {kind}'s dimensions",
                models,
                names,
                lambda m, kind=kind: {**m["scores"][kind], "full": m["full"]},
            )
        )
    return [*out, _d90(head, models)]


def _scores(head: str, models: Sequence[Any], names: Sequence[str], of: Any) -> Table:
    out = Table(title=head)
    out.add_column("model")
    out.add_column("parameters", justify="right")
    for name in names:
        out.add_column(f"{int(name):,}" if name.isdigit() else name, justify="right")
    for m in models:
        cells = [shown(of(m)[n]) if n in of(m) else "" for n in names]
        out.add_row(title(m), f"{m['parameters']:,}", *cells)
    return out


def _ratios(head: str, models: Sequence[Any]) -> Table:
    out = Table(title=head)
    out.add_column("model")
    for name in ("width", "ratio", "score", "last loss", "steps to ratio 1's last loss, by seed"):
        out.add_column(name, justify="right")
    for m in models:
        for ratio, r in m["ratios"].items():
            steps = " ".join(f"{n:,}" for n in r["steps"])
            cells = (shown(r["score"]), shown(r["last_loss"]), steps)
            out.add_row(title(m), str(m["width"]), ratio, *cells)
        out.add_section()
    return out


def _d90(head: str, models: Sequence[Any]) -> Table:
    out = Table(title=f"{head}: d90, by the mean and by each seed")
    for name in ("model", "parameters", *KINDS, *(f"{k}, each seed" for k in KINDS)):
        out.add_column(name, justify="left" if name == "model" else "right")

    def cell(m: Any, kind: str, d: int | None) -> str:
        return f"> {largest(m, kind):,}" if d is None else f"{d:,}"

    for m in models:
        means = [cell(m, k, m["d90"][k]) for k in KINDS]
        each = [" ".join(cell(m, k, d) for d in m["d90_seeds"][k]) for k in KINDS]
        out.add_row(title(m), f"{m['parameters']:,}", *means, *each)
    return out


def largest(model: Mapping[str, Any], kind: str) -> int:
    """The largest dimension that was tried."""
    return max(int(d) for d in model["scores"][kind])


def draw(out: pathlib.Path | None, result: Mapping[str, Any], console: Console) -> None:
    """Scores or d90 against parameters, at each size's last step; d90 against steps, where a size
    has several.
    """
    models = result["models"]
    last = {(m["family"], m["size"]): m for m in sorted(models, key=_age)}
    sizes = sorted(last.values(), key=lambda m: m["parameters"])
    source = _source(result)
    if result["kind"] == "methods":
        _draw_scores(out, result, sizes, source, console)
        return
    if result["kind"] == "lora_plus":
        _draw_ratios(out, result, sizes, source, console)
        return
    x = [m["parameters"] for m in sizes]
    with figure(out, "d90_by_size", source, console) as axes:
        if axes is not None:
            _lines(axes, [(kind, x, sizes) for kind in KINDS])
            _finish(axes, result, "parameters of the encoder (log scale)")
    along: dict[tuple[str, str], list[Any]] = {}
    for m in sorted((m for m in models if m["step"] is not None), key=_age):
        along.setdefault((m["family"], m["size"]), []).append(m)
    along = {name: ms for name, ms in along.items() if len(ms) > 1}
    for kind in KINDS if along else ():
        with figure(out, f"d90_by_step_{kind}", source, console) as axes:
            if axes is not None:
                # The logarithm of a step has no place for step 0.
                lines = [(n, [max(m["step"], 1) for m in ms], ms) for n, ms in along.items()]
                _lines(axes, [(" ".join(n), x, ms) for n, x, ms in lines], kind)
                _finish(axes, result, "step of pre-training (log scale; 0 at 1)", f"{kind}: ")


def _lines(axes: Any, lines: Sequence[tuple[str, list[int], Any]], kind: str | None = None) -> None:
    """d90 by the mean, bars over the seeds; an open triangle where d90 is beyond all dimensions."""
    for i, (name, x, models) in enumerate(lines):
        colour, of = COLOURS[i % len(COLOURS)], kind or name

        def at(m: Any, d: int | None, of: str = of) -> int:
            return largest(m, of) if d is None else d

        y = [at(m, m["d90"][of]) for m in models]
        seeds = [[at(m, d) for d in m["d90_seeds"][of]] for m in models]
        low = [max(0, v - min(s)) for v, s in zip(y, seeds, strict=True)]
        high = [max(0, max(s) - v) for v, s in zip(y, seeds, strict=True)]
        axes.errorbar(x, y, [low, high], marker="o", capsize=3, color=colour, label=name)
        beyond = [(a, b) for a, b, m in zip(x, y, models, strict=True) if m["d90"][of] is None]
        if beyond:
            axes.plot(*zip(*beyond, strict=True), "^", color=colour, mfc="white", ms=11)


def _finish(axes: Any, result: Mapping[str, Any], x: str, prefix: str = "") -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(f"{prefix}d90 on {result['task']}, by {result['metric']} (log scale)")
    about = "bars: seeds; triangle: beyond\nthe dimensions that were tried"
    axes.legend(title=about, title_fontsize=8, fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _draw_scores(
    out: pathlib.Path | None,
    result: Mapping[str, Any],
    sizes: Sequence[Any],
    source: str,
    console: Console,
) -> None:
    with figure(out, "methods_by_size", source, console) as axes:
        if axes is None:
            return
        names = list(dict.fromkeys(n for m in sizes for n in m["scores"]))
        for i, name in enumerate(names):
            have = [m for m in sizes if name in m["scores"]]
            x = [m["parameters"] for m in have]
            mean, std = ([m["scores"][name][k] for m in have] for k in ("mean", "std"))
            label = NAMES.get(name, name.replace("_", " of "))
            colour = COLOURS[i % len(COLOURS)]
            axes.errorbar(x, mean, std, marker="o", capsize=3, color=colour, label=label)
        axes.axhline(result["constant"], color="0.7", linestyle=":", linewidth=1)
        axes.annotate(
            "largest class", (sizes[-1]["parameters"], result["constant"]), ha="right",
            va="bottom", fontsize=8, color="0.5",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the encoder (log scale)")
        axes.set_ylabel(f"{result['task']}, validation {result['metric']}")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)


def _draw_ratios(
    out: pathlib.Path | None,
    result: Mapping[str, Any],
    sizes: Sequence[Any],
    source: str,
    console: Console,
) -> None:
    """The last loss less plain LoRA's, by ratio, a line for each width; bars over the seeds."""
    with figure(out, "lora_plus_by_width", source, console) as axes:
        if axes is None:
            return
        x: list[float] = []
        for i, m in enumerate(sizes):
            by_ratio = {float(r): v["last_loss"]["values"] for r, v in m["ratios"].items()}
            x, plain = sorted(by_ratio), by_ratio[1.0]
            less = [[a - b for a, b in zip(by_ratio[r], plain, strict=True)] for r in x]
            mean = [sum(d) / len(d) for d in less]
            low = [y - min(d) for y, d in zip(mean, less, strict=True)]
            high = [max(d) - y for y, d in zip(mean, less, strict=True)]
            label = f"{title(m)}, width {m['width']}"
            colour = COLOURS[i % len(COLOURS)]
            axes.errorbar(x, mean, [low, high], marker="o", capsize=3, color=colour, label=label)
        axes.axhline(0, color="0.7", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=4)
        axes.set_xticks(x, [f"{r:g}" for r in x])
        axes.set_xlabel("rate of B / rate of A")
        axes.set_ylabel("last training loss, less that of ratio 1")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)


def _source(result: Mapping[str, Any]) -> str:
    models = f"{len(result['models'])} encoders on {result['task']}"
    return f"{models}, {seeds(result['config']['seeds'])}; {made_on(result)}"


def _age(model: Mapping[str, Any]) -> float:
    return float("inf") if model["step"] is None else model["step"]
