"""Tables and the plot of in-context learning beside LoRA."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.by_size_shown import title
from experiments.common.plots import COLOURS, figure, made_on


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Accuracy by demonstrations and by LoRA's examples; and its spread; a row for each model."""
    models = result["models"]
    head = (
        f"{result['task']}, accuracy in percent; the largest class {100 * result['majority']:.1f}"
    )
    first = Table(title=head)
    first.add_column("model")
    first.add_column("parameters", justify="right")
    ks = _numbers(m["k_shot"].keys() | {str(k) for k in m["not_fitting"]} for m in models)
    ns = _numbers(m["peft"] for m in models)
    for name in (*(f"{k}-shot" for k in ks), *(f"LoRA on {n}" for n in ns)):
        first.add_column(name, justify="right")
    for m in models:
        cells = [_score(m["k_shot"][k]) if k in m["k_shot"] else "does not fit" for k in ks]
        cells += [_score(m["peft"][n]) for n in ns]
        first.add_row(title(m), f"{m['parameters']:,}", *cells)
    second = Table(title="accuracy, least to most; and tokens read for a prediction")
    names = ("k", "sets", "orders", "wordings", "random labels", "tokens with k", "tokens of LoRA")
    for name in ("model", *names):
        second.add_column(name, justify="left" if name == "model" else "right")
    for m in models:
        k, tokens = str(m["orders"]["k"]), m["tokens_per_prediction"]
        parts = [m["k_shot"][k], m["orders"], m["wordings"], m["random_labels"]]
        ends = [_ends(part["values"]) for part in parts]
        second.add_row(title(m), k, *ends, f"{tokens[k]:,.1f}", f"{tokens['peft']:,.1f}")
    return [first, second]


def _numbers(each: Any) -> list[str]:
    return sorted({n for names in each for n in names}, key=int)


def _score(score: Mapping[str, Any]) -> str:
    deviation = f" ± {100 * score['std']:.1f}" if len(score["values"]) > 1 else ""
    return f"{100 * score['mean']:.1f}{deviation}"


def _ends(values: Sequence[float]) -> str:
    return f"{100 * min(values):.1f} to {100 * max(values):.1f}" if values else ""


def draw(out: pathlib.Path | None, result: Mapping[str, Any], console: Console) -> None:
    """Accuracy against examples: demonstrations solid, LoRA dashed, a colour for each model."""
    source = f"{result['models'][0]['queries']} texts of {result['task']}, bars over "
    source += f"{result['config']['sets']} sets; {made_on(result)}"
    with figure(out, "in_context", source, console) as axes:
        if axes is None:
            return
        for i, m in enumerate(result["models"]):
            colour = COLOURS[i % len(COLOURS)]
            for by, style, name in ((m["k_shot"], "-", title(m)), (m["peft"], "--", None)):
                x = [int(k) for k in by]
                mean, std = ([s[key] for s in by.values()] for key in ("mean", "std"))
                axes.errorbar(
                    x, mean, std, linestyle=style, marker="o", capsize=3, color=colour, label=name
                )
        axes.axhline(result["majority"], color="0.7", linestyle=":", linewidth=1)
        axes.plot([], [], "--", color="0.4", label="LoRA on the examples")
        axes.plot([], [], ":", color="0.7", label="largest class")
        # Linear up to one example, so that none has a place too.
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({int(k) for m in result["models"] for k in (*m["k_shot"], *m["peft"])})
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set_xlabel("examples: demonstrations, or those that LoRA is trained on")
        axes.set_ylabel(f"{result['task']}, validation accuracy")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
