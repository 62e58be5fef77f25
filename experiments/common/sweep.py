"""Many runs of `lora_glue` under one folder: finished ones are kept, a cut one goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from experiments import lora_glue
from experiments.common import tasks
from experiments.common.command import claim, claimable
from experiments.common.loss_curves import fits
from experiments.common.models import fetch_model
from experiments.common.options import at_least
from experiments.common.parallel import Call, run_all
from experiments.common.report import (
    describe_machine,
    device_name,
    last_names,
    versions,
    without_folders,
    write_json,
)
from experiments.common.tokens import load_tokenizer

Results = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class SweepConfig(lora_glue.Config):
    """Options are those of `lora_glue`, for every run."""

    processes: int = 1
    """So many runs at once, each in a process of its own, on the same device."""
    baseline: bool = True
    """Of `lora_glue` alone: no run of a sweep trains that head."""


def refuse(config: SweepConfig, **swept: str) -> None:
    """**Raises:** `ValueError` for an option of `lora_glue` that the experiment sets itself, and
    for numbers and `--processes` that cannot be.

    **Arguments:** `swept`, the option's name and what to use in its place.
    """
    lora_glue.check(config)
    at_least(config, processes=1)
    if config.processes > 1 and config.out is None:
        raise ValueError("--processes needs --out: the runs' results come back as files")
    if config.processes > 1 and config.mesh is not None:
        raise ValueError("--processes has its runs share one device: leave out --mesh")
    if config.processes > 1 and jax.process_count() > 1:
        raise ValueError("--processes is for one host: this is a job of several already")
    plain = {f.name: f.default for f in dataclasses.fields(lora_glue.Config)}
    for name, instead in swept.items():
        if getattr(config, name) != plain[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is set by this experiment, run by run: use {instead}")


def runs_of(
    config: SweepConfig, changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, lora_glue.Config]:
    """One `lora_glue` configuration a name: the experiment's, with changes."""
    names = {f.name for f in dataclasses.fields(lora_glue.Config)}

    def one(name: str, change: Mapping[str, Any]) -> lora_glue.Config:
        out = None if config.out is None else config.out / "runs" / name
        own: dict[str, Any] = {n: getattr(config, n) for n in names}
        own |= {"baseline": False, "overwrite": False, "out": out, **change}
        return lora_glue.Config(**own)

    return {name: one(name, change) for name, change in changes.items()}


def begin(
    config: SweepConfig,
    runs: Mapping[str, lora_glue.Config],
    console: Console,
    free: Sequence[str] = (),
    window: int = 1,
) -> None:
    """Claim `--out`, once nothing is left that would end one of the runs before it trains.

    **Arguments:** `free`, see `claim`; `window`, see `loss_curves`.

    **Raises:** what `lora_glue.main` does before it trains.
    """
    claimable(config, free)
    rows = functools.cache(tasks.load)

    @functools.lru_cache(1)  # the runs of a model come one after another
    def model(name: str, outputs: int) -> Any:
        directory = fetch_model(name, console)
        load_tokenizer(directory)
        return lora_glue.build(config, directory, outputs, 0)

    for run in runs.values():
        lora_glue.check(run)
        data = rows(run.task, run.data)
        fits(window, run.steps(len(data.train)))
        built = model(run.model, max(1, len(data.task.labels)))
        lora_glue.text_length(run, built.config.longest)
        lora_glue.try_out(run, built)
    claim(config, free)


def sweep(
    runs: Mapping[str, lora_glue.Config],
    console: Console,
    more: Callable[[str], lora_glue.More | None] = lambda name: None,
    processes: int = 1,
) -> Results:
    """Every run's result by name. A run whose `result.json` stands is not repeated.

    **Arguments:** `more`, for a run by its name, what `lora_glue.main` takes: with several
    `processes` it has to be importable, a module's function or a `functools.partial` of one.

    **Raises:** `FailedCallsError` for runs that failed in processes of their own, after the others.
    """
    if processes > 1:
        _at_once(runs, console, more, processes)
    results: Results = {}
    for i, (name, config) in enumerate(runs.items(), 1):
        done = None if config.out is None else config.out / "result.json"
        kept = done is not None and done.exists()
        if processes == 1:
            console.rule(f"{i}/{len(runs)}: {name}")
            if kept:
                console.print("kept from before")
        if done is not None and kept:
            results[name] = json.loads(done.read_text())
        else:
            results[name] = run_one(config, console, more(name))
    return results


def _at_once(
    runs: Mapping[str, lora_glue.Config],
    console: Console,
    more: Callable[[str], lora_glue.More | None],
    processes: int,
) -> None:
    """Leave every run's `result.json` in its folder."""
    calls: dict[str, Call] = {}
    for name, config in runs.items():
        assert config.out is not None  # `refuse` has seen to it
        if not (config.out / "result.json").exists():
            calls[name] = Call(_printing, (config, more(name)), config.out / "output.txt")
    if len(calls) < len(runs):
        console.print(f"{len(runs) - len(calls)} of {len(runs)} runs are kept from before")
    for model in dict.fromkeys(runs[name].model for name in calls):
        fetch_model(model, console)  # once, and not by several processes
    run_all(calls, min(processes, len(calls)), console)


def _printing(config: lora_glue.Config, more: lora_glue.More | None) -> None:
    run_one(config, Console(width=100, markup=False), more)


def run_one(
    config: lora_glue.Config, console: Console, more: lora_glue.More | None
) -> dict[str, Any]:
    """One run, from its last checkpoint where it was begun; its checkpoints are not kept."""
    from sharding.cluster import is_main

    begun = config.out is not None and (config.out / "config.json").exists()
    result = lora_glue.main(dataclasses.replace(config, resume=begun), console, more)
    if config.out is not None and is_main():
        for folder in config.out.glob("seed*/checkpoint"):
            shutil.rmtree(folder)  # the trained state stands in adapter.safetensors
    return result


def metric_of(result: Mapping[str, Any], method: str) -> tuple[str, dict[str, float]]:
    """The task's first metric: its name, and mean and deviation."""
    name = next(iter(result["metrics"][method]))
    return name, result["metrics"][method][name]


def brief(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's result the experiment's own keeps."""
    seeds = [
        {k: v for k, v in s.items() if k not in ("train_seconds", "last_loss", "losses")}
        for s in result["seeds"]
    ]
    config = {k: v for k, v in result["config"].items() if k not in ("out", "data")}
    return {
        "config": config | {"model": last_names(config["model"])},
        "metrics": result["metrics"],
        "seeds": seeds,
        "wall_seconds": result["wall_seconds"],
        "tokens_per_second": result["tokens_per_second"],
    }


def write_result(config: SweepConfig, results: Results, **more: Any) -> dict[str, Any]:
    """The experiment's `result.json`, where it has a folder; returns what it holds."""
    about = without_folders(config) | {"model": last_names(config.model)}
    about["data"] = next(iter(results.values()))["data"]
    here = describe_machine()
    devices = [device_name(r["machine"]) for r in results.values()]
    elsewhere = {d: devices.count(d) for d in devices if d != device_name(here)}
    result = {
        "config": about,
        "runs": {name: brief(r) for name, r in results.items()},
        **more,
        "wall_seconds": sum(r["wall_seconds"] for r in results.values()),
        "machine": here,
        "versions": versions(),
        **({"elsewhere": elsewhere} if elsewhere else {}),
    }
    if config.out is not None:
        write_json(config.out / "result.json", result)
    return result
