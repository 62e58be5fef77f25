"""Many runs of `lora_glue` under one folder: finished ones are kept, a cut one goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from experiments import lora_glue
from experiments.common.report import describe_machine, versions, write_json

Results = dict[str, dict[str, Any]]


def refuse(config: lora_glue.Config, **swept: str) -> None:
    """**Raises:** `ValueError` for an option of `lora_glue` that the experiment sets itself.

    **Arguments:** `swept`, the option's name and what to use in its place.
    """
    plain = {f.name: f.default for f in dataclasses.fields(lora_glue.Config)}
    for name, instead in swept.items():
        if getattr(config, name) != plain[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is set by this experiment, run by run: use {instead}")


def runs_of(
    config: lora_glue.Config, changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, lora_glue.Config]:
    """One `lora_glue` configuration a name: the experiment's, with changes."""
    names = {f.name for f in dataclasses.fields(lora_glue.Config)}
    base = {n: getattr(config, n) for n in names} | {"baseline": False, "overwrite": False}
    return {
        name: lora_glue.Config(
            **base
            | {"out": None if config.out is None else config.out / "runs" / name}
            | dict(change)
        )
        for name, change in changes.items()
    }


def sweep(
    runs: Mapping[str, lora_glue.Config],
    console: Console,
    more: Callable[[str], lora_glue.More | None] = lambda name: None,
) -> Results:
    """Every run's result by name. A run whose `result.json` stands is not repeated."""
    from sharding.cluster import is_main

    results: Results = {}
    for i, (name, config) in enumerate(runs.items(), 1):
        console.rule(f"{i}/{len(runs)}: {name}")
        if config.out is not None and (config.out / "result.json").exists():
            console.print("kept from before")
            results[name] = json.loads((config.out / "result.json").read_text())
            continue
        begun = config.out is not None and (config.out / "config.json").exists()
        results[name] = lora_glue.main(
            dataclasses.replace(config, resume=begun), console, more(name)
        )
        if config.out is not None and is_main():
            for folder in config.out.glob("seed*/checkpoint"):
                shutil.rmtree(folder)  # the trained state stands in adapter.safetensors
    return results


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
        "config": config,
        "metrics": result["metrics"],
        "seeds": seeds,
        "wall_seconds": result["wall_seconds"],
        "tokens_per_second": result["tokens_per_second"],
    }


def write_result(config: lora_glue.Config, results: Results, **more: Any) -> dict[str, Any]:
    """The experiment's `result.json`, where it has a folder; returns what it holds."""
    about = dataclasses.asdict(config)
    about["data"] = next(iter(results.values()))["data"]
    about["out"] = None
    result = {
        "config": about,
        "runs": {name: brief(r) for name, r in results.items()},
        **more,
        "wall_seconds": sum(r["wall_seconds"] for r in results.values()),
        "machine": describe_machine(),
        "versions": versions(),
    }
    if config.out is not None:
        write_json(config.out / "result.json", result)
    return result
