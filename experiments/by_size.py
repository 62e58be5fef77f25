"""Pre-trained encoders of several sizes: d90, prompts beside full fine-tuning, or LoRA+ by size.

`--kind intrinsic_dimension` finds d90, the smallest random subspace (DID, SAID) that reaches 90% of
full fine-tuning, of every model (Aghajanyan et al. 2021, figures 2 and 3). `--kind methods` trains
prompts of several lengths, a prefix, everything, and `fixed_prompt` (Lester et al. 2021, figure 1),
which here is the frozen model with a trained head and no prompt: what is left of the prompt's run
when no prompt is trained. `--kind lora_plus` gives LoRA's B matrices several times the rate of A,
which should pay more in wide models (Hayou et al. 2024). Without arguments: one model on the sample
of this package.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from rich.console import Console

from experiments.common import by_size_shown, dimensions, runtime
from experiments.common.command import command
from experiments.common.family import Member, members
from experiments.common.loss_curves import rounded, steps_to, windows
from experiments.common.options import at_least, one_or_more
from experiments.common.report import (
    describe_machine,
    scored,
    versions,
    without_folders,
    write_json,
)
from experiments.common.sweep import Results, SweepConfig, begin, refuse, runs_of, sweep

FIXED = "fixed_prompt"


@dataclasses.dataclass(frozen=True)
class Config(SweepConfig):
    """Options are those of `lora_glue`, for every run; `--lr` is the random subspaces'."""

    kind: Literal["intrinsic_dimension", "methods", "lora_plus"] = "intrinsic_dimension"
    """What is run on every model."""
    models: tuple[str, ...] = ("novels",)
    """Encoders: directories such as `pretrain` writes, `novels`, `minilm`, or names on the hub."""
    dims: tuple[int, ...] = (50, 200, 1000, 5000)
    """The numbers of dimensions; SAID's scales, one a layer, are among them."""
    lengths: tuple[int, ...] = (1, 5, 20, 100)
    """Virtual tokens of the prompts; --prompt is the prefix's."""
    least: int = 64
    """Leave out prompts beside which a model can read fewer tokens of a text than this."""
    ratios: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0)
    """How many times as fast as A LoRA's B learns; 1 is plain LoRA."""
    window: int = 20
    """Steps that a point of LoRA+'s curves is the mean of."""
    full_epochs: int | None = None
    """Epochs of full fine-tuning; without it as many as the others'."""
    full_lr: float | None = None
    """The rate of full fine-tuning; without it the method's own."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the tables and the plots."""
    console = console or Console()
    swept = {"model": "--models", "method": "--kind", "dimensions": "--dims"}
    if config.kind == "methods":
        swept |= {"lr": "the methods' own, and --full-lr"}
    at_least(config, window=1, full_epochs=1)
    if config.kind == "intrinsic_dimension":
        one_or_more(config, "dims")
    if config.kind == "lora_plus" and 1.0 not in config.ratios:
        raise ValueError("--ratios: 1 is what the others are held against")
    refuse(config, lora_plus="--ratios", **swept)
    found = members(config.models, console)
    by_model = {m: changes(config, m, console) for m in found}
    runs = runs_of(
        config,
        {
            f"{member.label}_{name}": {"model": member.name, **change}
            for member, own in by_model.items()
            for name, change in own.items()
        },
    )
    free = ("models", "dims", "lengths", "ratios", "window")
    begin(config, runs, console, free, config.window if config.kind == "lora_plus" else 1)
    results = sweep(runs, console, lambda name: dimensions.constant, config.processes)
    for name, r in results.items():
        if r["config"]["model"] != runs[name].model:
            was = r["config"]["model"]
            raise ValueError(
                f"{name} in --out is of {was}, not {runs[name].model}: use another --out"
            )
    any_run = next(iter(results.values()))
    metric = next(iter(any_run["seeds"][0]["validation"]))
    rows = [row(config, m, tuple(own), results, metric) for m, own in by_model.items()]
    result = {
        "experiment": "by_size",
        "kind": config.kind,
        "task": config.task,
        "data": any_run["data"],
        "metric": metric,
        "models": rows,
        "constant": any_run["seeds"][0]["constant"][metric],
        "wall_seconds": sum(r["wall_seconds"] for r in results.values()),
        "config": without_folders(config) | {"data": any_run["data"] if config.data else None},
        "machine": describe_machine(),
        "versions": versions(),
    }
    for table in by_size_shown.tables(result):
        console.print(table)
    for note in notes(result):
        console.print(note)
    by_size_shown.draw(config.out, result, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def changes(config: Config, member: Member, console: Console) -> dict[str, dict[str, Any]]:
    """A model's runs by name, as changes of a `lora_glue` configuration.

    **Raises:** `ValueError` for `--dims` all of which are beyond its parameters.
    """
    full = {"epochs": config.full_epochs or config.epochs, "lr": config.full_lr}
    if config.kind == "intrinsic_dimension":
        kept = tuple(d for d in config.dims if d < member.parameters)
        if not kept:
            raise ValueError(f"--dims: {member.title} has {member.parameters:,} parameters alone")
        if len(kept) < len(config.dims):
            console.print(f"{member.title}: dimensions beyond its parameters are left out")
        return dimensions.changes(kept, full)
    if config.kind == "lora_plus":
        return {f"ratio_{r:g}": {"method": "lora", "lora_plus": r} for r in config.ratios}
    out: dict[str, dict[str, Any]] = {"full": full | {"method": "full"}, FIXED: {"method": "head"}}
    for n in config.lengths:
        left = min(config.length, member.longest - n)
        if left < min(config.least, config.length):
            console.print(
                f"{member.title}: a prompt of {n} is left out, since {left} of the "
                f"{member.longest} tokens that it reads would be left for a text"
            )
            continue
        out[f"prompt_{n}"] = {"method": "prompt", "prompt": n}
    return out | {"prefix": {"method": "prefix"}}


def row(
    config: Config, member: Member, names: tuple[str, ...], results: Results, metric: str
) -> dict[str, Any]:
    """One model's scores, and what follows from them."""
    scores = {
        name: scored([s["validation"][metric] for s in results[f"{member.label}_{name}"]["seeds"]])
        for name in names
    }
    about: dict[str, Any] = {
        "family": member.family,
        "size": member.size,
        "parameters": member.parameters,
        "width": member.width,
        "step": member.step,
        "seeds": config.seeds,
    }
    if config.kind == "methods":
        return about | {"scores": scores}
    if config.kind == "lora_plus":
        return about | {"ratios": ratios(config, member, scores, results)}
    full = scores["full"]
    by_kind = {
        kind: {
            name.removeprefix(f"{kind}_"): s for name, s in scores.items() if name.startswith(kind)
        }
        for kind in dimensions.KINDS
    }

    def d90(kind: str, of: Any) -> int | None:
        return dimensions.smallest({int(d): of(s) for d, s in by_kind[kind].items()}, of(full))

    return about | {
        "full": full,
        "scores": by_kind,
        "d90": {kind: d90(kind, lambda s: s["mean"]) for kind in by_kind},
        "d90_seeds": {
            kind: [d90(kind, lambda s, i=i: s["values"][i]) for i in range(config.seeds)]
            for kind in by_kind
        },
    }


def ratios(
    config: Config, member: Member, scores: dict[str, Any], results: Results
) -> dict[str, Any]:
    """By ratio: the score, each seed's losses in windows, and its steps to plain LoRA's last."""
    curves = {
        f"{r:g}": windows(results[f"{member.label}_ratio_{r:g}"], config.window)
        for r in config.ratios
    }
    return {
        ratio: {
            "score": scores[f"ratio_{ratio}"],
            "curves": [rounded(c) for c in found],
            "last_loss": scored([float(c[-1]) for c in found]),
            "steps": [
                steps_to([float(x) for x in c], float(plain[-1]), config.window)
                for c, plain in zip(found, curves["1"], strict=True)
            ],
        }
        for ratio, found in curves.items()
    }


def notes(result: dict[str, Any]) -> list[str]:
    """Where answering the largest class alone would count as 90%."""
    if result["kind"] != "intrinsic_dimension":
        return []
    found: list[str] = []
    for m in result["models"]:
        note = dimensions.hollow(result["metric"], result["constant"], m["full"]["mean"])
        if note:
            found.append(f"{by_size_shown.title(m)}: {note}")
    return found


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("by_size", Config, main, __doc__))
