"""In-context learning beside LoRA on the same examples: decoders of several sizes.

A decoder reads k demonstrations and a text, and answers with the label whose word is likeliest
(Brown et al. 2020): over several sets of demonstrations, over their order, over wordings of the
task, and with random labels in the demonstrations (Min et al. 2022). LoRA is trained on the same
demonstrations through the same template, and on more examples, and then reads no demonstrations
(Liu et al. 2022). Demonstrations are drawn from texts short enough for k of them to fit before
every text that is asked about. Without arguments: a decoder that knows nothing, on the sample of
this package.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Literal

from rich.console import Console

from experiments.common import in_context_shown, runtime
from experiments.common.command import claim, claimable, command
from experiments.common.models import fetch_model
from experiments.common.options import at_least
from experiments.common.parallel import Call, run_all
from experiments.common.report import (
    describe_machine,
    last_names,
    versions,
    without_folders,
    write_json,
)
from experiments.common.tasks import load
from experiments.common.wordings import WORDINGS

ClassTask = Literal["sst2", "mrpc", "cola", "rte", "qnli", "qqp", "mnli", "sample"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which models, on what, and how."""

    models: tuple[str, ...] = ("tiny",)
    """Decoders: directories in Hugging Face's layout, such as `pretrain` writes, or `tiny`."""
    task: ClassTask = "sample"
    """GLUE's task, or the sample of this package."""
    data: pathlib.Path | None = None
    """Folder with the task's files; without it GLUE is fetched from the hub."""
    shots: tuple[int, ...] = (0, 1, 4, 16)
    """Numbers of demonstrations; those that do not fit a model's context are left out."""
    sets: int = 5
    """Sets of demonstrations, and trained LoRAs, of each number."""
    orders: int = 8
    """Orders of the first set of the most demonstrations that fit."""
    wording: int = 0
    """The number of the template; all of them are tried on the first set."""
    queries: int = 200
    """Texts of validation that are asked about, drawn once."""
    pool: int = 2000
    """Training texts that demonstrations are drawn from, drawn once."""
    context: int | None = None
    """Tokens that are read at most; without it as many as the model was made for."""
    normalise: Literal["sum", "mean"] = "sum"
    """Compare labels by their words' log-likelihood, or by that of a token of them."""
    calibrate: bool = False
    """Take from every label's score what it has for a text that says nothing (Zhao et al. 2021)."""
    peft: tuple[int, ...] = (16, 64)
    """LoRA is trained on the demonstrations, and on so many examples."""
    steps: int = 100
    """Of each training."""
    rows: int = 16
    """Examples of a step."""
    lr: float | None = None
    """LoRA's peak learning rate; without it the method's own (experiments/common/decoders.py)."""
    rank: int = 8
    """LoRA's rank."""
    alpha: float = 16.0
    """LoRA's alpha; updates are scaled by alpha / rank."""
    batch: int = 32
    """Prompts that are scored at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    processes: int = 1
    """So many models at once, each in a process of its own, on the same device."""
    out: pathlib.Path | None = None
    """Folder for result.json, each model's own, and the plot."""
    resume: bool = False
    """Keep the models that --out has, and go on."""
    overwrite: bool = False
    """Throw away what --out holds."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Measure every model, print and write the table and the plot."""
    console = console or Console()
    check(config)
    if config.out is not None:
        claimable(config, free=("models",))
    for name in config.models:
        if name != "tiny":
            fetch_model(name, console)
    load(config.task, config.data)  # what is wrong with it is told before anything is thrown away
    if config.out is not None:
        claim(config, free=("models",))
    if config.processes > 1:
        left = {n: p for n, p in kept(config).items() if not p.exists()}
        calls = {
            n: Call(one, (config, n, None), p.with_name("output.txt")) for n, p in left.items()
        }
        run_all(calls, min(config.processes, len(calls)), console)
    found = [one(config, name, console) for name in config.models]
    models = sorted((f["model"] for f in found), key=lambda m: m["parameters"])
    result = {
        "experiment": "in_context",
        "task": config.task,
        "data": found[0]["data"],
        "metric": "accuracy",
        "majority": found[0]["majority"],
        "models": models,
        "wall_seconds": sum(f["wall_seconds"] for f in found),
        "config": without_folders(config) | {"data": found[0]["data"] if config.data else None},
        "machine": describe_machine(),
        "versions": versions(),
    }
    for table in in_context_shown.tables(result):
        console.print(table)
    in_context_shown.draw(config.out, result, console)
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def check(config: Config) -> None:
    """**Raises:** `ValueError` for options that cannot be."""
    if not config.models or len({last_names(n) for n in config.models}) < len(config.models):
        raise ValueError("--models: one or more, of different names (the last three of a path)")
    at_least(config, sets=1, orders=1, queries=1, pool=1, steps=1, rows=1, batch=1, processes=1)
    if not config.shots or min(config.shots) < 0 or min(config.peft, default=1) < 1:
        raise ValueError("--shots are numbers from 0, --peft from 1")
    count = len(WORDINGS[config.task])
    if not 0 <= config.wording < count:
        raise ValueError(f"--wording {config.wording}: {config.task} has 0 to {count - 1}")
    if config.out is None and (config.resume or config.processes > 1):
        raise ValueError("--resume and --processes need --out, where models' results are kept")


def kept(config: Config) -> dict[str, pathlib.Path]:
    """Each model's own `result.json`."""
    assert config.out is not None  # `check` has seen to it
    runs = config.out / "runs"
    return {n: runs / last_names(n).replace("/", "_") / "result.json" for n in config.models}


def one(config: Config, name: str, console: Console | None) -> dict[str, Any]:
    """One model's result, which is kept, with the data's and the largest class's."""
    from experiments.common.in_context_runs import measure

    console = console or Console(width=100, markup=False)
    done = None if config.out is None else kept(config)[name]
    if done is not None and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    start = time.perf_counter()
    result = measure(config, name, load(config.task, config.data), console)
    result["wall_seconds"] = time.perf_counter() - start
    if done is not None:
        done.parent.mkdir(parents=True, exist_ok=True)
        write_json(done, result)
    return result


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("in_context", Config, main, __doc__))
