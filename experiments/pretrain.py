"""Pre-train families of small language models on a folder of texts, from nothing.

Encoders (BERT) learn masked tokens, decoders (Llama) next tokens, encoder-decoders (T5) corrupted
spans, in several sizes on the same tokens by one vocabulary. Every model is a directory in Hugging
Face's layout, at the end and at steps on the way.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from experiments.common import runtime
from experiments.common.command import claim, command
from experiments.common.console import bar
from experiments.common.logs import MetricsLog
from experiments.common.numbers import Precision, Stage
from experiments.common.options import at_least, one_or_more
from experiments.common.pretrain_shown import draw, table
from experiments.common.pretrain_sizes import FAMILIES, STARTS, Family, Start, shape_of
from experiments.common.report import describe_machine, peak_memory, versions, write_json

if TYPE_CHECKING:
    from experiments.common.pretrain_data import Data


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    families: Annotated[tuple[Family, ...], tyro.conf.arg(aliases=["--family"])] = ("encoder",)
    """Kinds of models."""
    sizes: tuple[str, ...] = ("0.3m", "1m")
    """Of each kind: 0.3m, 1m, 4m, 16m, 64m."""
    data: pathlib.Path | None = None
    """Folder of texts (.txt, or .tar.xz with such), or the `data` folder of an earlier run."""
    held_out: int = 4
    """Texts that are kept for validation."""
    vocabulary: int = 8192
    """The tokenizer's size."""
    length: int = 128
    """Tokens of a row."""
    tokens_per_step: int = 8192
    """Tokens of a batch: its rows times --length."""
    steps: int = 4096
    """Of each model."""
    checkpoints: tuple[int, ...] = ()
    """Steps whose models are kept, beside the last; without them 0, 64, 256, 1024, ..."""
    starts: tuple[Start, ...] = STARTS
    """What of an encoder does not start from drawn numbers: words, positions, queries."""
    lr: float | None = None
    """The peak learning rate; without it the size's own (experiments/common/pretrain_sizes.py)."""
    seed: int = 0
    """Of the start, the choice of validation's texts, batches and masks."""
    validation_rows: int = 1024
    """Rows that validation reads at most."""
    precision: Precision | None = None
    """As in `finetune`; without it bfloat16 with float32 masters (mixed), on a CPU float32."""
    mesh: str | None = None
    """Devices, as data=2,fsdp=4; `all` puts every one on fsdp; without it one device is used."""
    stage: Stage = 1
    """ZeRO's stage on that mesh."""
    call: int | None = None
    """Steps of one compiled call; without it 64, on a CPU 1, which is faster there."""
    minutes: float | None = None
    """Begin no further model after so many minutes; --resume goes on with those that are left."""
    out: pathlib.Path | None = None
    """Folder for the models, result.json, plots, the tokens and what --resume goes on from."""
    resume: bool = False
    """Keep the models of --out that are complete, and go on with one that was cut."""
    overwrite: bool = False
    """Throw away what --out holds of these families and sizes."""
    save_every: int = 1024
    """Steps between the states that a cut run goes on from."""


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Train every model, print and write; returns what `result.json` holds."""
    from experiments.common.pretrain_data import prepared

    console = console or Console()
    begun = time.perf_counter()
    out = check(config)
    data = prepared(
        config.data,
        out / "data",
        vocabulary=config.vocabulary,
        held_out=config.held_out,
        length=config.length,
        seed=config.seed,
        console=console,
    )
    claimed(config, out)
    counts = data.about["tokens"]
    console.print(
        f"{data.about['source']}; {counts['train']:,} + {counts['validation']:,} tokens of "
        f"{data.vocabulary.size:,}"
    )
    left: list[str] = []
    for family, size in itertools.product(config.families, config.sizes):
        done = out / family / size / "result.json"
        if config.resume and done.exists():
            console.print(f"{family} {size}: kept from before")
            continue
        minutes = (time.perf_counter() - begun) / 60
        if config.minutes is not None and minutes >= config.minutes:
            left.append(f"{family} {size}")
            continue
        write_json(done, run(config, family, size, data, out, console))
    result = {
        "config": dataclasses.asdict(config) | {"out": None, "data": None},
        "data": dict(data.about),
        "models": found(out),
        "left": left,
        "wall_seconds": time.perf_counter() - begun,
        "peak_memory": peak_memory(),
        "machine": describe_machine(),
        "versions": versions("tokenizers"),
    }
    console.print(table(result))
    draw(out, result, console)
    write_json(out / "result.json", result)
    if left:
        console.print(f"no time was left for {', '.join(left)}: go on with --resume")
    console.print(f"written to {out}")
    return result


def check(config: Config) -> pathlib.Path:
    """`--out`. **Raises:** `ValueError` for options that cannot be, before anything is read."""
    if config.out is None:
        raise ValueError("--out is missing: a folder for the models")
    one_or_more(config, "families", "sizes")
    for family in config.families:
        for size in config.sizes:
            shape_of(family, size)
    at_least(config, steps=2, validation_rows=1, save_every=1, call=1)
    at_least(config, tokens_per_step=config.length)
    wrong = [m for m in config.checkpoints if not 0 <= m <= config.steps]
    if wrong:
        raise ValueError(f"--checkpoints {wrong[0]}: from 0 to the {config.steps} of --steps")
    return config.out


def claimed(config: Config, out: pathlib.Path) -> None:
    """Make the models' folders ready, each a run of its own: one folder may have models of other
    numbers of steps.

    **Raises:** `ValueError` for one that holds a run not to be lost.
    """
    from sharding.cluster import is_main

    # What a run may go on with otherwise than it began.
    free: dict[str, Any] = {
        "families": (),
        "sizes": (),
        "data": None,
        "minutes": None,
        "call": None,
    }
    for family, size in itertools.product(config.families, config.sizes):
        folder = out / family / size
        begun = (folder / "config.json").exists()
        if begun and config.overwrite and not config.resume and is_main():
            shutil.rmtree(folder)
        claim(dataclasses.replace(config, **free, out=folder, resume=config.resume and begun))


def run(
    config: Config, family: Family, size: str, data: Data, out: pathlib.Path, console: Console
) -> dict[str, Any]:
    """One model: its size, its losses, and how fast it learned."""
    import jax

    from experiments.common.pretrain_export import exporter
    from experiments.common.pretrain_loop import default_marks, pretrain, speed
    from experiments.common.pretrain_objectives import objective
    from experiments.common.pretrain_start import started
    from experiments.common.pretrain_steps import Pretrainer, Schedule
    from experiments.common.scale import Scale, compute_dtype

    cpu = jax.default_backend() == "cpu"
    precision: Precision = config.precision or ("float32" if cpu else "mixed")
    shape = shape_of(family, size)
    made = objective(
        family, shape, data.vocabulary, config.length, compute_dtype(precision), config.seed
    )
    if family == "encoder":
        made = dataclasses.replace(made, params=started(made.params, config.starts, data))
    rate = shape.rate if config.lr is None else config.lr
    trainer = Pretrainer(
        made,
        Schedule(rate, config.steps),
        config.tokens_per_step // config.length,
        data.train,
        data.validation,
        config.seed,
        Scale(config.mesh, config.stage, precision),
    )
    marks = (*config.checkpoints, config.steps) if config.checkpoints else None
    folder = out / family / size
    with (
        MetricsLog(folder, resume=config.resume) as metrics,
        bar(console, f"{family} {size}", config.steps) as shown,
    ):

        def log(entry: dict[str, Any]) -> None:
            metrics.write(entry)
            if "loss" in entry:
                shown(entry["step"], entry["loss"], entry["tokens_per_second"])
            else:
                told = f"step {entry['step']:,}, validation loss {entry['validation']:.4f}"
                console.print(f"{family} {size}: {told}", highlight=False)

        progress = pretrain(
            trainer,
            folder,
            marks or default_marks(config.steps),
            export=exporter(made.model, data.folder),
            log=log,
            resume=config.resume,
            call=config.call or (1 if cpu else 64),
            save_every=config.save_every,
            rows=config.validation_rows,
        )
    tokens = trainer.rows * made.window
    return {
        "family": family,
        "size": size,
        "shape": dataclasses.asdict(shape),
        "parameters": sum(x.size for x in jax.tree.leaves(made.params)),
        "precision": precision,
        "learning_rate": rate,
        "starts": list(config.starts) if family == "encoder" else [],
        "steps": progress.step,
        "tokens": tokens * progress.step,
        "training_loss": progress.loss,
        "validation": progress.validation,
        "labels": progress.labels,
        "tokens_per_second": speed(progress, tokens),
        "seconds_per_step": progress.seconds / max(progress.timed, 1),
        "machine": describe_machine(),
    }


def found(out: pathlib.Path) -> list[dict[str, Any]]:
    """The results of all models that are complete, the families in order, small ones first."""
    paths = [p for family in FAMILIES for p in (out / family).glob("*/result.json")]
    results = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    order = {family: i for i, family in enumerate(FAMILIES)}
    return sorted(results, key=lambda r: (order[r["family"]], r["parameters"]))


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("pretrain", Config, main, __doc__))
