"""Fine-tune a pre-trained encoder on a GLUE task by LoRA, or by any other method.

Without arguments: a small encoder and a small sentiment task that both come with this package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console

import jpeft
from experiments.common import bases, runtime
from experiments.common.command import claim, claimable, command
from experiments.common.console import bar, result_table
from experiments.common.logs import MetricsLog
from experiments.common.methods import (
    LINEAR,
    RECIPES,
    Method,
    PromptStart,
    Sizes,
    called_with,
    make_room,
)
from experiments.common.metrics import evaluate, majority
from experiments.common.models import fetch_model, machine_layout
from experiments.common.numbers import Optimiser, Precision, Quantised, Stage
from experiments.common.options import at_least
from experiments.common.pipeline import Batches, Shapes, collate, shapes
from experiments.common.report import (
    describe_machine,
    mean_and_deviation,
    peak_memory,
    versions,
    write_json,
)
from experiments.common.tasks import Dataset, load
from experiments.common.tokens import Example, load_tokenizer, tokenise

if TYPE_CHECKING:
    from experiments.common.training import Programs, Schedule, Trainer

TaskName = Literal["sst2", "mrpc", "cola", "rte", "stsb", "qnli", "qqp", "mnli", "sample"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    task: TaskName = "sample"
    """GLUE's task, or the sample of this package."""
    data: pathlib.Path | None = None
    """Folder with the task's files; without it GLUE is fetched from the hub."""
    model: str = "novels"
    """`novels`, this package's encoder of 4M parameters; `minilm`, all-MiniLM-L6-v2, fetched once;
    a directory in Hugging Face's layout; or a name on the hub."""
    method: Method = "lora"
    """What is trained; every method but full, subspace and said trains the head beside it."""
    rank: int = 8
    """LoRA's rank, and that of its kin."""
    alpha: float = 16.0
    """LoRA's alpha; updates are scaled by alpha / rank."""
    targets: tuple[str, ...] = (r"(query|value)/kernel$",)
    """LoRA's targets: regular expressions on parameter paths."""
    lora_dropout: float = 0.0
    """Dropout of the low-rank branch's input."""
    lora_plus: float | None = None
    """LoRA+'s ratio: B matrices learn so many times as fast as the rest."""
    bottleneck: int = 64
    """The adapters' size."""
    prompt: int = 20
    """Virtual tokens of a prompt or a prefix."""
    prompt_start: PromptStart = "vocabulary"
    """Where a prompt starts: drawn words' embeddings, or uniform in [-0.5, 0.5]."""
    words: tuple[int, int] = (1996, 6996)
    """Rows of the vocabulary that a prompt starts from; BERT's whole words start at 1996."""
    dimensions: int = 2000
    """The subspaces' dimensions."""
    top: int = 2
    """The top layers that `top` trains."""
    lr: float | None = None
    """The peak learning rate; without it the method's own (experiments/common/methods.py)."""
    epochs: int = 5
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after so many steps."""
    batch: int = 32
    """Examples a step."""
    length: int = 128
    """Tokens an example is cut to; batches are padded to their own length, not to this."""
    buckets: int = 3
    """The lengths that batches may have: each is compiled, and the more, the less padding."""
    seeds: int = 1
    """Runs, with seeds 0, 1, ...; the report gives mean and standard deviation."""
    pooling: Literal["cls", "mean"] = "mean"
    """What the head reads: the mean over tokens, or the first token as BERT has it."""
    precision: Precision = "float32"
    """What the model computes in, bfloat16 with float32 trained arrays, with bfloat16 ones that
    have float32 masters (mixed), or with bfloat16 ones rounded at random (stochastic)."""
    quantize: Quantised | None = None
    """Frozen weights of the encoder's linear layers in this format."""
    mesh: str | None = None
    """Devices, as data=2,fsdp=4; `all` puts every one on fsdp; without it one device is used."""
    stage: Stage = 3
    """ZeRO's stage on that mesh: 0 is data parallel, 3 shards parameters too."""
    accumulate: int = 1
    """Take a batch in so many parts, and sum their gradients."""
    optimiser: Optimiser = "adamw"
    """AdamW with moments in float32, or in 8 bits."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between steps."""
    dropout: bool = True
    """The model's own dropout in training."""
    baseline: bool = True
    """Train a head on the frozen encoder too, to compare with."""
    out: pathlib.Path | None = None
    """Folder for result.json, metrics.jsonl, the adapter and checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in --out."""
    overwrite: bool = False
    """Throw away what --out holds."""
    save_every: int = 200
    """Steps between checkpoints."""
    tensorboard: bool = False
    """Write TensorBoard events into --out too."""

    @property
    def sizes(self) -> Sizes:
        """What the method is built from."""
        return Sizes(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sizes)})

    def method_transform(self) -> jpeft.Transform:
        """The transform of `method`."""
        return RECIPES[self.method].transform(self.sizes)

    def steps(self, examples: int) -> int:
        """Of a training on so many."""
        return self.max_steps or self.epochs * -(-examples // self.batch)

    def schedule(self, steps: int, width: int) -> Schedule:
        """The optimiser's course over so many steps, on a model of this width."""
        from experiments.common.training import Schedule

        recipe = RECIPES[self.method]
        rate = recipe.rate_at(width) if self.lr is None else self.lr
        about: dict[str, Any] = {"ratio": self.lora_plus, "name": self.optimiser}
        return Schedule(rate, steps, weight_decay=recipe.decay, **about)


More = Callable[["Trainer", Any, "Prepared"], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The data as examples, with the shapes of their batches."""

    data: Dataset
    train: Sequence[Example]
    validation: Sequence[Example]
    train_shapes: Shapes
    validation_shapes: Shapes
    pad: int

    @property
    def labels(self) -> np.ndarray:
        """Validation's answers."""
        return np.array([r.label for r in self.data.validation])


def check(config: Config) -> None:
    """**Raises:** `ValueError` for options that cannot be, or that do not go together."""
    at_least(config, epochs=1, max_steps=1, batch=1, length=3, buckets=1, seeds=1)
    at_least(config, accumulate=1, save_every=1)
    bases.refuse(config.quantize, config.method)


def text_length(config: Config, longest: int) -> int:
    """Tokens that a text is cut to, of the `longest` that the model reads.

    **Raises:** `ValueError` where virtual tokens leave none.
    """
    room = RECIPES[config.method].room(config.sizes)
    if longest - room < 3:
        raise ValueError(
            f"{room} virtual tokens leave {max(0, longest - room)} of the {longest} that the model "
            "reads for a text: at least 3"
        )
    return min(config.length, longest - room)


def prepare(config: Config, directory: pathlib.Path) -> Prepared:
    """Read and tokenise. **Raises:** `DataError`, `ModelError`, `CheckpointError`."""
    from jpeft.hf.checkpoints import read_bert_config

    model = read_bert_config(directory)
    data = load(config.task, config.data)
    tokenizer = load_tokenizer(directory)
    length = text_length(config, model.longest)
    train, validation = (tokenise(tokenizer, r, length) for r in (data.train, data.validation))
    return Prepared(
        data,
        train,
        validation,
        shapes(train, config.batch, length, config.buckets),
        shapes(validation, 4 * config.batch, length, config.buckets),
        model.pad_token_id,
    )


def build(config: Config, directory: pathlib.Path, outputs: int, seed: int) -> Any:
    """The model, with a head of its own seed."""
    import jax

    from experiments.common.scale import compute_dtype
    from jpeft.hf import load_sequence_classifier

    model, _ = load_sequence_classifier(
        directory,
        outputs,
        key=jax.random.key(seed),
        dtype=compute_dtype(config.precision),
        pooling=config.pooling,
        **machine_layout(),
    )
    return model


def trainer_of(
    config: Config,
    model: Any,
    seed: int,
    steps: int,
    like: Programs | None = None,
) -> Trainer:
    """The compiled trainer of a configuration, for so many steps.

    **Arguments:** `like`, the programs of another seed's, None for new ones.
    """
    from experiments.common.scale import axes_of, scale_of
    from experiments.common.training import Trainer

    apply, params = jpeft.functional(model)
    if config.quantize is not None:
        params = bases.in_format(params, LINEAR, config.quantize, _uses(apply, params))
    length = RECIPES[config.method].room(config.sizes)
    about = model.config
    first = about.vocab_size if config.method == "prompt" else about.pad_token_id
    room = functools.partial(make_room, length=length, first=first)
    schedule = config.schedule(steps, model.config.hidden_size)
    return Trainer(
        apply,
        params,
        config.method_transform(),
        schedule,
        seed,
        config.dropout,
        room,
        scale_of(config),
        axes_of(model),
        options=called_with(config.method, length),
        like=like,
    )


def try_out(config: Config, model: Any) -> None:
    """Trace what a training of the model begins with, and compute nothing.

    **Raises:** `jpeft.TargetError`, `jpeft.LeafError` and `ValueError` for what would end it there.
    """
    import jax

    from experiments.common.scale import check_batch

    def begun() -> None:
        trainer_of(config, model, 0, 1)

    check_batch(config)
    jax.eval_shape(begun)


def run_seed(
    config: Config,
    directory: pathlib.Path,
    prepared: Prepared,
    seed: int,
    console: Console,
    more: More | None = None,
    like: Programs | None = None,
) -> tuple[dict[str, Any], Programs]:
    """Train and evaluate once: the metrics, of this method and of the frozen encoder's head; and
    the programs, for another seed.

    **Arguments:** `more`, what else to write into the result, from the trainer and the state;
    `like`, another seed's programs.
    """
    from experiments.common.head import frozen_head
    from experiments.common.loop import train
    from experiments.common.scale import on_host
    from sharding.cluster import is_main

    task = prepared.data.task
    model = build(config, directory, max(1, len(task.labels)), seed)
    batches = Batches(prepared.train, prepared.train_shapes, prepared.pad, seed)
    steps = config.steps(len(prepared.train))
    trainer = trainer_of(config, model, seed, steps, like)
    params, transform = trainer.params, trainer.transform
    summary = jpeft.summary(transform, params, uses=trainer.uses())
    if seed == 0:
        console.print(str(summary), highlight=False)
    folder = None if config.out is None else config.out / f"seed{seed}"
    report = folder if is_main() else None
    start = time.perf_counter()
    with (
        MetricsLog(report, resume=config.resume, tensorboard=config.tensorboard) as metrics,
        bar(console, f"seed {seed}", steps) as shown,
    ):

        def log(entry: dict[str, Any]) -> None:
            metrics.write(entry)
            shown(entry["step"], entry["loss"], entry["tokens_per_second"])

        state, progress = train(
            trainer, batches, folder, log=log, resume=config.resume, save_every=config.save_every
        )
        outputs = trainer.predict(
            state, prepared.validation, prepared.validation_shapes, prepared.pad
        )
        scores = evaluate(task.metrics, outputs, prepared.labels)
        metrics.write({"step": progress.step, **{f"validation/{k}": v for k, v in scores.items()}})
    result = {
        "seed": seed,
        "validation": scores,
        "steps": progress.step,
        "losses": [round(x, 5) for x in progress.losses],
        "last_loss": float(np.mean(progress.losses[-20:])) if progress.losses else None,
        "tokens_per_second": progress.tokens_per_second,
        "step_seconds": progress.step_seconds,
        "trained": summary.trainable,
        "train_seconds": time.perf_counter() - start,
    }
    if more is not None:
        result |= more(trainer, state, prepared)
    if seed == 0:
        result["step_memory_mib"] = trainer.step_memory(_longest(batches))
    if with_baseline(config):
        sides = (prepared.train, prepared.validation)
        result["frozen_head"] = evaluate(
            task.metrics,
            frozen_head(model, *sides, prepared.validation_shapes, prepared.pad, seed),
            prepared.labels,
        )
    whole = on_host(state)
    if report is not None:
        about = {"method": config.method, "task": config.task, "model": config.model}
        jpeft.save(report / "adapter.safetensors", whole, transform, about)
        write_json(report / "result.json", result)
    return result, trainer.programs


def with_baseline(config: Config) -> bool:
    """Whether the frozen encoder's head is trained beside the method."""
    return config.baseline and config.method != "head"


def _longest(batches: Batches) -> Any:
    """A batch of the longest shape."""
    longest = batches.examples[int(np.argmax(batches.sizes))]
    return collate([longest], batches.shapes, batches.pad)


def _uses(apply: Any, params: Any) -> Any:
    import jax.numpy as jnp

    return jpeft.uses(apply, params, *[jnp.zeros((1, 8), jnp.int32)] * 3)


def main(
    config: Config, console: Console | None = None, more: More | None = None
) -> dict[str, Any]:
    """Run every seed, print the table, and write `result.json`; returns what it holds."""
    console = console or Console()
    start = time.perf_counter()
    check(config)
    claimable(config)
    directory = fetch_model(config.model, console)
    prepared = prepare(config, directory)
    data = prepared.data
    try_out(config, build(config, directory, max(1, len(data.task.labels)), 0))
    claim(config)
    console.print(
        f"{data.task.name}: {len(data.train):,} + {len(data.validation):,} examples, {data.source}"
    )
    results: list[dict[str, Any]] = []
    programs: Programs | None = None
    for seed in range(config.seeds):
        done = None if config.out is None else config.out / f"seed{seed}" / "result.json"
        if config.resume and done is not None and done.exists():
            results.append(json.loads(done.read_text()))
        else:
            about = (config, directory, prepared, seed, console, more)
            found, programs = run_seed(*about, programs)
            results.append(found)
    names = data.task.metrics
    rows = {config.method: {n: [r["validation"][n] for r in results] for n in names}}
    if with_baseline(config):
        rows["frozen encoder, head"] = {n: [r["frozen_head"][n] for r in results] for n in names}
    rows["majority class" if data.task.labels else "mean score"] = {
        n: [v] for n, v in majority(names, prepared.labels, len(data.task.labels)).items()
    }
    summary = {r: {n: mean_and_deviation(v) for n, v in of.items()} for r, of in rows.items()}
    speed = float(np.mean([r["tokens_per_second"] for r in results]))
    seconds = time.perf_counter() - start
    console.print(result_table(data.task.name, summary, config.seeds))
    console.print(f"{speed:,.0f} tokens/s in training, {seconds:,.0f} s in all")
    result = {
        "config": dataclasses.asdict(config) | {"out": None},
        "data": data.source,
        "metrics": summary,
        "seeds": results,
        "tokens_per_second": speed,
        "wall_seconds": seconds,
        "peak_memory": peak_memory(),
        "machine": describe_machine(),
        "versions": versions(),
    }
    if config.out is not None:
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("lora_glue", Config, main, __doc__))
