"""Fine-tune a language model on prompts and answers, by any method.

Without arguments: a small Llama over bytes, which knows nothing, on the sample of this package.
Decoders (Llama and its kin, GPT-2) read the prompt before the answer, T5 in its encoder; the loss
is on the answer alone. The held-out data are scored by their loss, and by answers generated to
their prompts.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

import jpeft
from experiments.common import bases, runtime
from experiments.common.command import claim, claimable, command
from experiments.common.console import bar, held_out_table
from experiments.common.logs import MetricsLog
from experiments.common.methods import Method, PromptStart, Sizes
from experiments.common.numbers import Attention, Keep, Optimiser, Precision, Quantised, Stage
from experiments.common.options import at_least
from experiments.common.pairs import Pair, Pairs, PairTask, load_pairs
from experiments.common.report import describe_machine, peak_memory, versions, write_json

if TYPE_CHECKING:
    from experiments.common.decoders import Loaded
    from experiments.common.language import LanguageTrainer, Render, Tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    task: PairTask = "sample"
    """The data: instructions, GSM8K, E2E, WikiSQL, multiple choice, or json of your own."""
    data: pathlib.Path | None = None
    """Folder with the task's files."""
    model: str = "tiny"
    """A directory in Hugging Face's layout, a name on the hub, a llama2.c file, or `tiny`."""
    vocabulary: pathlib.Path | None = None
    """The vocabulary of a llama2.c file."""
    adapter: pathlib.Path | None = None
    """An adapter to go on from, in HF PEFT's layout or a file of jpeft.save; it sets the method."""
    method: Method | None = None
    """What is trained; without it LoRA, and all of `tiny`."""
    rank: int = 8
    """LoRA's rank, and that of its kin."""
    alpha: float = 16.0
    """LoRA's alpha; updates are scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """LoRA's targets: regular expressions on parameter paths; without them query and value."""
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
    dimensions: int = 2000
    """The subspaces' dimensions."""
    template: str = "{prompt}"
    """What the model reads, with the task's prompt at {prompt}."""
    chat: bool = False
    """Put the prompt into the model's own chat template."""
    pack: bool = False
    """Several pairs in a row of --length tokens, none reading another (decoders)."""
    length: int = 512
    """The most tokens of a pair; longer ones are left out."""
    buckets: int = 3
    """The lengths that batches may have: each is compiled, and the more, the less padding."""
    lr: float | None = None
    """The peak learning rate; without it the method's own (experiments/common/decoders.py)."""
    epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after so many steps."""
    batch: int = 16
    """Rows a step."""
    limit: int | None = None
    """Use only so many pairs of the training data, the first."""
    held_out: int = 200
    """Pairs of the held-out data whose loss is taken, the first."""
    generate: int = 50
    """Prompts of the held-out data that are answered, the first; 0 for none."""
    new_tokens: int = 64
    """The most tokens of an answer."""
    beams: int = 1
    """Beams of the search; 1 takes the likeliest token always."""
    length_penalty: float = 1.0
    """Of the beam search."""
    seed: int = 0
    """Of the start, the order of the data and dropout."""
    precision: Precision = "float32"
    """What the model computes in, and frozen parameters are held in: bfloat16 with float32 trained
    arrays, with bfloat16 ones that have float32 masters (mixed), or with bfloat16 ones rounded at
    random (stochastic)."""
    quantize: Quantised | None = None
    """Frozen weights of linear layers (but the head) in this format."""
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
    remat: bool = False
    """Forget activations and compute them again in the backward pass."""
    keep: Keep = "nothing"
    """What --remat keeps of a layer: nothing, all products, or those with weights."""
    straight: bool = False
    """Layers as straight-line code in place of a loop, which moves less memory on a GPU (and copies
    no weights on a CPU), and takes a few times as long to compile."""
    attention: Attention = "xla"
    """How a decoder's attention is computed: by the compiler, or by cuDNN's flash attention (NVIDIA
    GPUs, bfloat16)."""
    dropout: bool = True
    """The model's own dropout in training."""
    out: pathlib.Path | None = None
    """Folder for result.json, metrics.jsonl, the adapter, the answers and checkpoints."""
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
        names = {f.name for f in dataclasses.fields(Sizes)} & {
            f.name for f in dataclasses.fields(self)
        }
        return Sizes(**{n: getattr(self, n) for n in names})

    @property
    def chosen(self) -> Method:
        """The method."""
        return self.method or ("full" if self.model == "tiny" else "lora")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The model and the data.

    **Attributes:** `render`, what makes a prompt as the model reads it; `examples` and `held`, the
    pairs of training and of the held-out data whose loss is taken, as tokens; `left_out`, how many
    were too long.
    """

    pairs: Pairs
    loaded: Loaded
    render: Render
    examples: Sequence[Tokens]
    held: Sequence[Tokens]
    left_out: int


def prepare(config: Config, console: Console) -> Prepared:
    """Read the data and the model.

    **Raises:** `DataError`, `ModelError`, `CheckpointError`; `ValueError` for what does not suit
    the model or the devices.
    """
    import jax

    from experiments.common.decoders import TRAINS_THE_MODEL, load
    from experiments.common.language import encode
    from experiments.common.models import STRAIGHT
    from experiments.common.scale import check_batch, compute_dtype, remat_of
    from experiments.common.scores import SCORES

    if config.attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"--attention cudnn is for NVIDIA GPUs: this is a {jax.default_backend()}")
    check_batch(config)
    pairs = load_pairs(config.task, config.data)
    if config.generate:
        for name in pairs.metrics:
            SCORES[name](["a"], [["a"]])  # what is not installed is told before training
    key = jax.random.key(config.seed)
    dtype = compute_dtype(config.precision)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat_of(config.remat, config.keep)}
    options |= {"key": key, "quantize": config.quantize}
    if config.straight:
        options["unroll"] = STRAIGHT
    if config.attention != "xla":
        options["implementation"] = config.attention
    if config.chosen not in TRAINS_THE_MODEL:
        options["param_dtype"] = dtype  # what is frozen is held in what is computed in
    loaded = load(config.model, config.vocabulary, console, **options)
    render = renderer(config, loaded)
    two_sided = loaded.two_sided
    if config.pack and two_sided:
        raise ValueError("--pack is for decoders: this model has an encoder")
    how = (loaded.codec, render, config.length, two_sided)
    (examples, longer), (held, longer_held) = (
        encode(part, *how)
        for part in (pairs.train[: config.limit], pairs.validation[: config.held_out])
    )
    if not examples or not held:
        raise ValueError(f"every pair has more than --length {config.length} tokens: make it more")
    return Prepared(pairs, loaded, render, examples, held, longer + longer_held)


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Train, score, print and write; returns what `result.json` holds."""
    from experiments.common.language import batches, packed
    from experiments.common.loop import train
    from experiments.common.scale import on_host
    from sharding.cluster import is_main

    console = console or Console()
    start = time.perf_counter()
    check(config)
    claimable(config)
    prepared = prepare(config, console)
    pairs, loaded, left_out = prepared.pairs, prepared.loaded, prepared.left_out
    examples, held = prepared.examples, prepared.held
    console.print(
        f"{config.task}: {len(examples):,} + {len(held):,} pairs of {pairs.source}"
        + (f"; {left_out:,} longer than {config.length} tokens are left out" if left_out else "")
    )
    rows = packed(examples, config.length) if config.pack else examples
    about = (loaded.two_sided, config.buckets)
    made = batches(rows, loaded.codec, config.batch, config.length, config.seed, *about)
    steps = config.max_steps or config.epochs * made.per_epoch
    trainer = trainer_of(config, loaded, steps)
    uses = trainer.uses()
    shown = jpeft.summary(trainer.transform, trainer.params, uses=uses)
    console.print(str(shown), highlight=False)
    before = held_out_loss(trainer, trainer.init().trainable, held, loaded, config)
    claim(config)
    folder = None if config.out is None else config.out / f"seed{config.seed}"
    report = folder if is_main() else None
    with (
        MetricsLog(report, resume=config.resume, tensorboard=config.tensorboard) as metrics,
        bar(console, config.chosen, steps) as told,
    ):

        def log(entry: dict[str, Any]) -> None:
            metrics.write(entry)
            told(entry["step"], entry["loss"], entry["tokens_per_second"])

        state, progress = train(
            trainer, made, folder, log=log, resume=config.resume, save_every=config.save_every
        )
    after = held_out_loss(trainer, state, held, loaded, config)
    scores, answers = generated(config, trainer, state, pairs, loaded, prepared.render)
    result = {
        "config": dataclasses.asdict(config),
        "data": pairs.source,
        "left_out": left_out,
        "trained": shown.trainable,
        "steps": progress.step,
        "losses": [round(x, 5) for x in progress.losses],
        "held_out": {"loss_before": before, "loss": after, "perplexity": math.exp(after)},
        "scores": scores,
        "answers": answers[:10],
        "tokens_per_second": progress.tokens_per_second,
        "wall_seconds": time.perf_counter() - start,
        "peak_memory": peak_memory(),
        "machine": describe_machine(),
        "versions": versions("sacrebleu"),
    }
    console.print(held_out_table(result))
    whole = on_host(state)
    if config.out is not None and report is not None:
        save(config, loaded, trainer, whole, report)
        write_json(config.out / "result.json", result)
        console.print(f"written to {config.out}")
    return result


def check(config: Config) -> None:
    """**Raises:** `ValueError` for options that cannot be, or that do not go together."""
    at_least(config, epochs=1, max_steps=1, batch=1, length=1, buckets=1, limit=1, held_out=1)
    at_least(config, generate=0, new_tokens=1, beams=1, accumulate=1, save_every=1)
    if "{prompt}" not in config.template:
        raise ValueError("--template has no {prompt}, where the task's prompt is put")
    if config.chat and config.template != "{prompt}":
        raise ValueError("--chat and --template both say how a prompt stands: give one")
    if config.method in ("head", "top"):
        raise ValueError(f"--method {config.method} is a classifier's: there is no head here")
    if config.adapter is not None and config.method is not None:
        raise ValueError("--adapter brings its method along: leave --method out")
    bases.refuse(config.quantize, config.chosen)
    if config.attention == "cudnn" and config.precision == "float32":
        raise ValueError("--attention cudnn computes in 16 bits: pass --precision bfloat16")
    if config.pack and config.chosen in ("prompt", "prefix"):
        raise ValueError("--pack has no place for the virtual tokens of prompts and prefixes")


def renderer(config: Config, loaded: Loaded) -> Render:
    """What makes a prompt as the model reads it."""
    from experiments.common.texts import chat_template

    if not config.chat:
        return lambda prompt: config.template.replace("{prompt}", prompt)
    if loaded.directory is None:
        raise ValueError(f"--chat: {config.model} has no directory with a chat template")
    return chat_template(loaded.directory)


def trainer_of(config: Config, loaded: Loaded, steps: int) -> LanguageTrainer:
    """The compiled trainer, from the method's start or an adapter's state."""
    from experiments.common.decoders import LAYOUTS, recipes
    from experiments.common.language import LanguageTrainer, language_uses
    from experiments.common.scale import axes_of, scale_of
    from experiments.common.training import Schedule
    from jpeft.hf import load_adapter

    apply, params = jpeft.functional(loaded.model)
    if config.quantize is not None:
        layout, uses = LAYOUTS[type(loaded.model)], language_uses(apply, params, loaded.two_sided)
        params = bases.in_format(params, layout.linear, config.quantize, uses)
    recipe = recipes(loaded.model)[config.chosen]
    transform, start = recipe.transform(config.sizes), None
    if config.adapter is not None:
        uses = language_uses(apply, params, loaded.two_sided)
        if config.adapter.is_dir():
            about = {"uses": uses, "config": loaded.model.config}
            transform, start = load_adapter(config.adapter, params, loaded.family, **about)
        else:
            transform, start = jpeft.restore(config.adapter, params, uses=uses)
    # What knows nothing has farther to go.
    rate = 10 * recipe.rate if config.model == "tiny" else recipe.rate
    rate = rate if config.lr is None else config.lr
    about: dict[str, Any] = {"ratio": config.lora_plus, "name": config.optimiser}
    schedule = Schedule(rate, steps, weight_decay=recipe.decay, **about)
    room = jpeft.room(transform)
    first = jpeft.first_virtual_id(transform, loaded.model.config.vocab_size)
    return LanguageTrainer(
        apply,
        params,
        transform,
        schedule,
        config.seed,
        config.dropout,
        scale=scale_of(config),
        axes=axes_of(loaded.model),
        straight=config.straight,
        two_sided=loaded.two_sided,
        virtual=(room, first),
        start=start,
    )


def try_out(config: Config, loaded: Loaded) -> None:
    """Trace what a training of the model begins with, and compute nothing.

    **Raises:** `jpeft.TargetError`, `jpeft.LeafError` and `ValueError` for what would end it there.
    """
    import jax

    def begun() -> None:
        trainer_of(config, loaded, 1)

    jax.eval_shape(begun)


def held_out_loss(
    trainer: LanguageTrainer, state: Any, held: Sequence[Tokens], loaded: Loaded, config: Config
) -> float:
    """Nats a token, over all labels."""
    from experiments.common.language import batches

    about = (loaded.two_sided, config.buckets)
    made = batches(held, loaded.codec, config.batch, config.length, 0, *about)
    made = made.of(trainer.share(config.batch))
    sums = [
        [float(x) for x in trainer.sums(trainer.frozen, state, batch)]
        for batch, _ in zip(made, range(made.per_epoch), strict=False)
    ]
    loss, count = np.sum(sums, axis=0)
    return float(loss / max(count, 1))


def generated(
    config: Config,
    trainer: LanguageTrainer,
    state: Any,
    pairs: Pairs,
    loaded: Loaded,
    render: Render,
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """The scores of the answers to the first held-out prompts, and the answers."""
    from experiments.common.answers import answer
    from experiments.common.scores import SCORES

    chosen: list[Pair] = pairs.validation[: config.generate]
    if not chosen:
        return {}, []
    prompts = [p.prompt for p in chosen]
    search = (config.batch, config.new_tokens, config.beams, config.length_penalty)
    found = answer(trainer, state, prompts, loaded, render, *search)
    wanted = [p.references or (p.answer,) for p in chosen]
    scores = {name: SCORES[name](found, wanted) for name in pairs.metrics}
    shown = [
        {"prompt": p.prompt, "answer": text, "wanted": refs[0]}
        for p, text, refs in zip(chosen, found, wanted, strict=True)
    ]
    return scores, shown


def save(
    config: Config, loaded: Loaded, trainer: LanguageTrainer, state: Any, folder: pathlib.Path
) -> None:
    """The adapter twice: a file of jpeft's, and a directory in HF PEFT's layout, where the model is
    one of Hugging Face's.
    """
    from jpeft.hf import save_adapter

    about = {"method": config.chosen, "task": config.task, "model": config.model}
    jpeft.save(folder / "adapter.safetensors", state, trainer.transform, about)
    if loaded.directory is not None:
        task = "SEQ_2_SEQ_LM" if loaded.two_sided else "CAUSAL_LM"
        options: dict[str, Any] = {"base_model_name": config.model, "task_type": task}
        options["config"] = loaded.model.config
        save_adapter(
            folder / "adapter",
            trainer.transform,
            state,
            trainer.params,
            loaded.family,
            uses=trainer.uses(),
            **options,
        )


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("finetune", Config, main, __doc__))
