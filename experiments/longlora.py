"""LongLoRA: perplexity by length of context, after several ways to extend a short-context Llama.

Without arguments: a small random Llama on the sample of this package, in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import jpeft
from experiments.common import runtime
from experiments.common.command import command, ready
from experiments.common.console import bar
from experiments.common.long_texts import draw_rows, read_texts
from experiments.common.numbers import Precision, Stage
from experiments.common.plots import COLOURS, figure, made_on
from experiments.common.report import describe_machine, versions, write_json
from experiments.common.timing import timed_steps

if TYPE_CHECKING:
    from experiments.common.decoders import Loaded
    from experiments.common.pipeline import Share

QKVO = r"self_attn/[qkvo]_proj/kernel$"


@dataclasses.dataclass(frozen=True)
class Variant:
    """`transform`, by rank, None for no training; `shifted`, attention in training; `extended`,
    whether positions are interpolated.
    """

    transform: Callable[[int], jpeft.Transform] | None
    shifted: bool = False
    extended: bool = True


# From `none` on, each differs from the next in one thing: training, embeddings and norms, the
# attention in training, low rank. `lora` has shifted attention, as in the paper's table 2.
VARIANTS: dict[str, Variant] = {
    "original": Variant(None, extended=False),
    "none": Variant(None),
    "lora": Variant(lambda rank: jpeft.LoRA(rank, 2.0 * rank, QKVO), shifted=True),
    "longlora": Variant(lambda rank: jpeft.longlora(rank, 2.0 * rank), shifted=True),
    "longlora_full": Variant(lambda rank: jpeft.longlora(rank, 2.0 * rank)),
    "full": Variant(lambda rank: jpeft.Train(r".*")),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to extend, on which texts, and how."""

    model: pathlib.Path | None = None
    """A Llama in llama2.c's binary format, or a directory in Hugging Face's layout."""
    vocabulary: pathlib.Path | None = None
    """llama2.c's tokenizer for it, a `.bin`; a directory has its own `tokenizer.json`."""
    data: pathlib.Path | None = None
    """A folder of texts: `.txt` files, or `.tar.xz` files that hold some."""
    length: int | None = None
    """Tokens of a row in training; by default four times the model's context."""
    lengths: tuple[int, ...] = ()
    """Contexts to evaluate with, each a divisor of `--length`; by default its 1/4, 1/2 and 1."""
    group: int | None = None
    """Tokens in a group of the shifted attention; by default a quarter of `--length`."""
    steps: int = 60
    """Training steps of each variant."""
    batch: int = 2
    """Rows of a step."""
    lr: float = 2e-3
    """The peak learning rate, of all variants."""
    rank: int = 8
    """Of the low-rank updates; alpha is twice the rank."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Untrained: original, and none (positions interpolated). Trained: lora and longlora, with
    shifted attention; longlora_full and full, with whole attention."""
    held_out: int = 8
    """Texts of `--data` that are kept for the evaluation."""
    rows: int = 8
    """Held-out rows of `--length` tokens."""
    rounds: int = 3
    """Turns of the timed steps."""
    seed: int = 0
    """Of the split of the texts, the rows, and the updates' initial values."""
    precision: Precision = "float32"
    """What the model computes in and trained arrays are kept in, as finetune's."""
    mesh: str | None = None
    """Devices, as data=2,fsdp=4; `all` puts every one on fsdp; without it one device is used."""
    stage: Stage = 3
    """ZeRO's stage on that mesh: 0 is data parallel, 3 shards parameters too."""
    accumulate: int = 1
    """Take a batch in so many parts, and sum their gradients."""
    offload: bool = False
    """Keep the optimiser's state in the host's memory between steps."""
    out: pathlib.Path | None = None
    """Folder for `result.json` and the plot."""
    overwrite: bool = False
    """Throw away the result that --out holds."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens: `trained`, the model's context; `length`, a row's; `lengths`, the contexts of the
    evaluation, ascending; `group`, of the shifted attention.
    """

    trained: int
    length: int
    lengths: tuple[int, ...]
    group: int


def sizes_of(config: Config, trained: int) -> Sizes:
    """The lengths asked for. **Raises:** `ValueError` for those that do not fit each other."""
    length = 4 * trained if config.length is None else config.length
    group = length // 4 if config.group is None else config.group
    if length < 2 or group < 2 or length % group or group % 2:
        raise ValueError(
            f"--length {length} does not split into groups of {group}: give a --group that is even "
            "and divides it"
        )
    lengths = tuple(sorted(set(config.lengths or (length // 4, length // 2, length))))
    for n in lengths:
        if n < 2 or length % n:
            raise ValueError(f"--lengths {n}: a context has 2 tokens or more and divides {length}")
    return Sizes(trained, length, lengths, group)


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Train, evaluate, print and write the table and the plot."""
    from experiments.common.pipeline import share_of
    from experiments.common.scale import scale_of

    console = console or Console()
    unknown = [v for v in config.variants if v not in VARIANTS]
    if unknown or not config.variants:
        raise ValueError(f"--variants {' '.join(unknown)}: there are {', '.join(VARIANTS)}")
    if min(config.steps, config.batch, config.rows, config.rounds, config.held_out) < 1:
        raise ValueError("--steps, --batch, --rows, --rounds and --held-out are 1 or more")
    ready(config.out, config.overwrite)
    loaded = load(config, console)
    model, encode = loaded.model, loaded.codec.encode
    sizes = sizes_of(config, model.config.max_position_embeddings)
    train, held = read_texts(config.data, config.held_out, config.seed)
    rng = np.random.default_rng(config.seed)
    tests = rows_of(held, encode, config.rows, sizes, model.config.vocab_size, rng)
    count = config.steps * config.batch
    share = share_of(scale_of(config).zero(), config.batch)
    own = share.of(np.arange(count).reshape(config.steps, config.batch).T).T.ravel()
    texts = rows_of(train, encode, count, sizes, model.config.vocab_size, rng, own)
    texts = texts.reshape(config.steps, share.count, sizes.length)
    rows = run(config, sizes, model, texts, tests, console)
    result = {
        "config": {k: _plain(v) for k, v in dataclasses.asdict(config).items()} | {"out": None},
        "sizes": dataclasses.asdict(sizes),
        "held_out": sorted(held),
        "trained_on": len(train),
        "rows": rows,
        "machine": describe_machine(),
        "versions": versions(),
    }
    console.print(table(sizes, rows))
    if config.out is not None:
        write_json(config.out / "result.json", result)
    draw(config, result, console)
    return result


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, pathlib.Path) else value


def load(config: Config, console: Console) -> Loaded:
    """The model asked for; without one, two random layers over 64 bytes.

    **Raises:** `ValueError` where it is no Llama; `ModelError`, `jpeft.CheckpointError`.
    """
    import jax
    from flax import nnx

    from experiments.common import decoders
    from experiments.common.scale import compute_dtype
    from experiments.common.texts import byte_codec
    from jpeft.hf.models import LLAMA
    from jpeft.models.llama import Llama

    if config.model is None:
        if config.vocabulary is not None:
            raise ValueError("--vocabulary goes with a --model in llama2.c's format")
        small = dataclasses.replace(decoders.TINY, hidden_size=32, max_position_embeddings=64)
        dtype = compute_dtype(config.precision)
        model = Llama(small, rngs=nnx.Rngs(config.seed), dtype=dtype)
        return decoders.Loaded(model, byte_codec(), LLAMA, None)
    key = jax.random.key(config.seed)
    dtype = compute_dtype(config.precision)
    options: dict[str, Any] = {"dtype": dtype, "remat": False, "key": key}
    loaded = decoders.load(str(config.model), config.vocabulary, console, **options)
    if not isinstance(loaded.model, Llama):
        raise ValueError(f"--model {config.model}: this experiment extends Llamas alone")
    return loaded


def rows_of(
    texts: Mapping[str, str],
    encode: Any,
    count: int,
    sizes: Sizes,
    vocabulary: int,
    rng: Any,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of tokens, int32 `(count, length)`, or of them those that `own` numbers.

    **Raises:** `ValueError` for ids the model lacks; see `draw_rows`.
    """
    from sharding.cluster import largest

    rows = draw_rows(texts, encode, count, sizes.length, rng, own)
    most = largest(int(rows.max()))
    if most >= vocabulary:
        raise ValueError(
            f"the tokenizer gives ids up to {most}, the model has {vocabulary} embeddings: "
            "they do not belong together"
        )
    return rows


def run(
    config: Config, sizes: Sizes, model: Any, texts: Any, tests: Any, console: Console
) -> dict[str, dict[str, Any]]:
    """Every variant's `perplexity` by context, and where it trains `trained` (how many numbers),
    `losses`, `ms` of a step and `mib` of the compiled step's temporaries.
    """
    import jax

    from experiments.common import next_tokens as nt
    from experiments.common.scale import axes_of, on_host, scale_of
    from experiments.common.training import Schedule

    original, params = jpeft.functional(model)
    whole, shifted = (nt.extended(model, sizes.length, g) for g in (None, sizes.group))
    total = {apply: jax.jit(functools.partial(nt.losses, apply)) for apply in (original, whole)}
    schedule = Schedule(config.lr, config.steps)
    rows: dict[str, dict[str, Any]] = {}
    trainers: dict[str, Any] = {}
    for name in config.variants:
        variant, tuned, row = VARIANTS[name], params, dict[str, Any]()
        if variant.transform is not None:
            apply, transform = shifted if variant.shifted else whole, variant.transform(config.rank)
            layout: dict[str, Any] = {"scale": scale_of(config), "axes": axes_of(model)}
            trainer = nt.NextTokens(
                apply, params, transform, schedule, config.seed, plain=whole, **layout
            )
            trainers[name] = trainer
            share = trainer.share(config.batch)
            state, done = train(trainer, texts, name, console, share)
            state = on_host(state)
            tuned = jpeft.merge(transform.rewrite(params, state))
            row["trained"] = sum(x.size for x in jax.tree.leaves(state))
            row["losses"] = [round(x, 5) for x in done.losses]
        # Attention is whole here, however it was in training.
        apply = whole if variant.extended else original
        row["perplexity"] = nt.perplexities(total[apply], tuned, tests, sizes.lengths)
        rows[name] = row
    if trainers:
        batch = next(iter(trainers.values())).share(config.batch).placed(nt.batch_of(texts[0]))
        for name, cost in timed_steps(trainers, batch, config.rounds).items():
            rows[name] |= {"ms": cost["ms"], "mib": cost["mib"]}
    return rows


def train(trainer: Any, texts: np.ndarray, name: str, console: Console, share: Share) -> Any:
    """`train_on`, with a bar."""
    from experiments.common.next_tokens import train_on

    with bar(console, name, len(texts)) as shown:
        return train_on(
            trainer, texts, lambda x: shown(x["step"], x["loss"], x["tokens_per_second"]), share
        )


def table(sizes: Sizes, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Variants down, contexts across, and what a step costs."""
    out = Table(title=f"held-out perplexity by context; trained on rows of {sizes.length:,}")
    out.add_column("variant")
    names = (*(f"{n:,}" for n in sizes.lengths), "trained", "ms a step", "MiB of temporaries")
    for name in names:
        out.add_column(name, justify="right")
    for variant, row in rows.items():
        cells = [f"{row['perplexity'][str(n)]:.2f}" for n in sizes.lengths]
        cost = [f"{row[k]:,.0f}" if k in row else "" for k in ("trained", "ms", "mib")]
        out.add_row(variant, *cells, *cost)
    return out


def draw(config: Config, result: dict[str, Any], console: Console) -> None:
    """Perplexity against context, one line a variant."""
    sizes = result["sizes"]
    model = "a random Llama" if config.model is None else config.model.stem
    texts = "the sample" if config.data is None else config.data.name
    source = (
        f"{model} ({sizes['trained']} tokens) on {texts}, {config.steps} steps of {config.batch} x "
        f"{sizes['length']}; {made_on(result)}"
    )
    with figure(config.out, "longlora", source, console) as axes:
        if axes is None:
            return
        for colour, (name, row) in zip(COLOURS, result["rows"].items(), strict=False):
            y = [row["perplexity"][str(n)] for n in sizes["lengths"]]
            # Two lines may lie on each other: the one below is seen around the one above.
            width = {"linewidth": 4, "alpha": 0.5} if VARIANTS[name].shifted else {"linewidth": 1.5}
            axes.plot(sizes["lengths"], y, marker="o", color=colour, label=name, **width)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
        axes.set_xticks(sizes["lengths"], [str(n) for n in sizes["lengths"]])
        axes.set_xlabel("tokens of context, attention whole")
        axes.set_ylabel("held-out perplexity")
        axes.legend(title="variant", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    runtime.restart_tuned()
    sys.exit(command("longlora", Config, main, __doc__))
