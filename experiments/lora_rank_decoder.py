"""LoRA's rank against the weights that it updates, of a decoder that writes answers.

Every run is one of `finetune`, scored by its loss on held-out answers, and by the answers that it
generates. Without arguments: two ranks on query and value, of a small Llama over bytes that
knows nothing.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import finetune
from experiments.common import runtime
from experiments.common.command import claim, claimable, command
from experiments.common.options import at_least, one_or_more
from experiments.common.parallel import Call, run_all
from experiments.common.plots import COLOURS, figure, made_on, seeds
from experiments.common.report import (
    describe_machine,
    last_names,
    model_title,
    scored,
    versions,
    without_folders,
    write_json,
)
from experiments.lora_rank import PAPER

WEIGHTS = {
    "q": (r"q_proj/kernel$",),
    "q,v": (r"[qv]_proj/kernel$",),
    "q,k,v,o": (r"[qkvo]_proj/kernel$",),
}


@dataclasses.dataclass(frozen=True)
class Config(finetune.Config):
    """Options are those of `finetune`, for every run; alpha is twice the rank."""

    ranks: tuple[int, ...] = (1, 8)
    """The ranks; the paper's are 1 2 4 8 64."""
    weights: tuple[str, ...] = ("q,v",)
    """Which projections: q, "q,v", "q,k,v,o"."""
    seeds: int = 1
    """Runs of each, with seeds 0, 1, ..."""
    processes: int = 1
    """So many runs at once, each in a process of its own, on the same device."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run, print and write the table and the plots."""
    console = console or Console()
    check(config)
    runs = runs_of(config)
    begin(config, runs, console)
    if config.processes > 1:
        at_once(runs, config.processes, console)
    results: dict[str, Any] = {}
    for i, (name, run) in enumerate(runs.items(), 1):
        done = None if run.out is None else run.out / "result.json"
        console.rule(f"{i}/{len(runs)}: {name}")
        if done is not None and done.exists():
            console.print("kept from before")
            results[name] = json.loads(done.read_text())
        else:
            results[name] = one(run, console)
    any_run = next(iter(results.values()))
    rows = {
        f"{label(w)}_r{r}": row(config, w, r, results) for w in config.weights for r in config.ranks
    }
    first = next(iter(rows.values()))
    result = {
        "experiment": "lora_rank_decoder",
        "config": without_folders(config) | {"model": last_names(config.model)},
        "data": any_run["data"],
        "metric": next((m for m in first["validation"] if m != "loss"), "loss"),
        "scores": {
            w: {str(r): rows[f"{label(w)}_r{r}"]["validation"] for r in config.ranks}
            for w in config.weights
        },
        "trained": {name: r["trained"] for name, r in rows.items()},
        "loss_before": any_run["held_out"]["loss_before"],
        "steps": any_run["steps"],
        "wall_seconds": sum(r["wall_seconds"] for r in results.values()),
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(table(result))
    for metric in first["validation"]:
        draw(config, result, metric, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def check(config: Config) -> None:
    """**Raises:** `ValueError` for options that the experiment sets, or that cannot be."""
    plain = {f.name: f.default for f in dataclasses.fields(finetune.Config)}
    swept = {"rank": "--ranks", "targets": "--weights", "alpha": "finetune", "seed": "--seeds"}
    for name, instead in (swept | {"method": "finetune", "adapter": "finetune"}).items():
        if getattr(config, name) != plain[name]:
            raise ValueError(f"--{name} is set by this experiment, run by run: use {instead}")
    one_or_more(config, "ranks", "weights")
    at_least(config, ranks=1, seeds=1, processes=1)
    unknown = [w for w in config.weights if w not in WEIGHTS]
    if unknown:
        raise ValueError(f"--weights {' '.join(unknown)}: there are {', '.join(WEIGHTS)}")
    if config.processes > 1 and config.out is None:
        raise ValueError("--processes needs --out: the runs' results come back as files")


def runs_of(config: Config) -> dict[str, finetune.Config]:
    """One `finetune` configuration a name."""
    names = [f.name for f in dataclasses.fields(finetune.Config)]
    shared: dict[str, Any] = {n: getattr(config, n) for n in names} | {"overwrite": False}
    runs: dict[str, finetune.Config] = {}
    for weights in config.weights:
        for rank in config.ranks:
            for seed in range(config.seeds):
                name = f"{label(weights)}_r{rank}_seed{seed}"
                own: dict[str, Any] = {"method": "lora", "rank": rank, "alpha": 2.0 * rank}
                own |= {"targets": WEIGHTS[weights], "seed": seed}
                own["out"] = None if config.out is None else config.out / "runs" / name
                runs[name] = finetune.Config(**shared | own)
    return runs


def begin(config: Config, runs: Mapping[str, finetune.Config], console: Console) -> None:
    """Claim `--out`, once nothing is left that would end one of the runs before it trains.

    **Raises:** what `finetune.main` does before it trains.
    """
    free = ("ranks", "weights", "seeds")  # runs' names tell them
    claimable(config, free)
    for run in runs.values():
        finetune.check(run)
    loaded = finetune.prepare(next(iter(runs.values())), console).loaded
    for run in runs.values():
        finetune.try_out(run, loaded)
    claim(config, free)


def label(weights: str) -> str:
    """Of a run's folder."""
    return weights.replace(",", "")


def one(run: finetune.Config, console: Console) -> dict[str, Any]:
    """One run, from its last checkpoint where it was begun."""
    begun = run.out is not None and (run.out / "config.json").exists()
    return finetune.main(dataclasses.replace(run, resume=begun), console)


def at_once(runs: Mapping[str, finetune.Config], processes: int, console: Console) -> None:
    """Leave every run's `result.json` in its folder."""
    calls: dict[str, Call] = {}
    for name, run in runs.items():
        assert run.out is not None  # `check` has seen to it
        if not (run.out / "result.json").exists():
            calls[name] = Call(_printing, (run,), run.out / "output.txt")
    run_all(calls, min(processes, max(1, len(calls))), console)


def _printing(run: finetune.Config) -> None:
    one(run, Console(width=100, markup=False))


def row(config: Config, weights: str, rank: int, results: Mapping[str, Any]) -> dict[str, Any]:
    """Of one rank and its weights: trained numbers, and each score by seed."""
    runs = [results[f"{label(weights)}_r{rank}_seed{s}"] for s in range(config.seeds)]
    found = {"loss": scored([r["held_out"]["loss"] for r in runs])}
    for metric in runs[0]["scores"]:
        found[metric] = scored([r["scores"][metric] / 100 for r in runs])
    return {"trained": runs[0]["trained"], "validation": found}


def table(result: Mapping[str, Any]) -> Table:
    """Weights and ranks down, losses and scores across; the paper's below."""
    config = result["config"]
    out = Table(title=f"{config['task']}, held out, by LoRA's rank and weights")
    metric = result["metric"]
    for name in ("weights", "rank", "trained", "loss", *([metric] if metric != "loss" else [])):
        out.add_column(name, justify="left" if name == "weights" else "right")
    for weights, by in result["scores"].items():
        for rank, found in by.items():
            trained = result["trained"][f"{label(weights)}_r{rank}"]
            cells = [f"{found['loss']['mean']:.4f}"]
            if metric != "loss":
                cells.append(f"{100 * found[metric]['mean']:.1f}%")
            out.add_row(weights, rank, f"{trained:,}", *cells)
    if metric != "loss":
        for weights, of in PAPER["WikiSQL"].items():
            low, high = min(of.values()), max(of.values())
            cells = ("1 to 64", "", "", f"{low} to {high}%")
            out.add_row(f"{weights} (paper, WikiSQL, GPT-3)", *cells)
    return out


def draw(config: Config, result: Mapping[str, Any], metric: str, console: Console) -> None:
    """A score against rank, one line a set of weights."""
    about = f"{model_title(result['config']['model'])} on {config.task}, {seeds(config.seeds)}"
    name = "lora_rank" if metric == "loss" else f"lora_rank_{metric}"
    with figure(config.out, name, f"{about}; {made_on(result)}", console) as axes:
        if axes is None:
            return
        x = sorted(config.ranks)
        for colour, (weights, by) in zip(COLOURS, result["scores"].items(), strict=False):
            values = [by[str(r)][metric]["values"] for r in x]
            mean = [statistics.fmean(v) for v in values]
            low = [m - min(v) for m, v in zip(mean, values, strict=True)]
            high = [max(v) - m for m, v in zip(mean, values, strict=True)]
            axes.errorbar(x, mean, [low, high], marker="o", capsize=3, color=colour, label=weights)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(r) for r in x])
        axes.set_xlabel("rank")
        held_out = "held-out loss, nats a token of the answer"
        axes.set_ylabel(held_out if metric == "loss" else f"held-out {metric}, share of answers")
        axes.legend(title="weights; bars: seeds", frameon=False)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("lora_rank_decoder", Config, main, __doc__))
