"""`python -m jpeft`: look into checkpoints and adapters, merge, convert, quantise and generate."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jpeft._disk import CheckpointError, listed, open_tensors

Type = Literal["float32", "bfloat16", "float16"]
Format = Literal["nf4", "fp4", "int8"]
LINEAR = r"/(layers?|h|block)/.*kernel$"


@dataclasses.dataclass(frozen=True)
class Inspect:
    """What is in a checkpoint or an adapter: options, tensors, sizes, and names to target."""

    directory: tyro.conf.Positional[pathlib.Path]
    """A Hugging Face directory (a model's or an adapter's), or a file of jpeft.save."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Write a model with an adapter merged into it, as a directory that transformers loads."""

    model: pathlib.Path
    """The base model's directory."""
    adapter: pathlib.Path
    """The adapter's directory."""
    out: pathlib.Path
    """The new directory."""
    dtype: Type = "float32"
    """The type of the written weights; the sum is made in it too."""
    overwrite: bool = False
    """Replace a model that stands in --out."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write an adapter in the other format: HF PEFT's, or a file of jpeft.save."""

    model: pathlib.Path
    """The base model's directory."""
    adapter: pathlib.Path
    """A directory in HF PEFT's layout, or a file of jpeft.save."""
    out: pathlib.Path
    """A directory, or for HF PEFT's a file to write."""
    overwrite: bool = False
    """Replace what stands at --out."""


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Write a model with weights in fewer bits, as a directory that jpeft.hf loads."""

    model: pathlib.Path
    """The model's directory."""
    out: pathlib.Path
    """The new directory."""
    format: Format = "nf4"
    """NF4, FP4 or int8."""
    block: int = 64
    """How many weights share a scale, in 4 bits."""
    double: bool = True
    """Keep the scales of 4 bits in 8 bits."""
    targets: tuple[str, ...] = (LINEAR,)
    """Regular expressions on parameter paths; by default every linear layer but the head."""
    dtype: Type = "bfloat16"
    """The type of all other weights, and of those that the quantised ones stand for."""
    error: bool = False
    """Read the model a second time, and print how far each weight is off."""
    overwrite: bool = False
    """Replace a model that stands in --out."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it (T5), printing each piece of text as it comes."""

    model: pathlib.Path
    """The model's directory, with its tokenizer.json."""
    prompt: str
    """The text to continue."""
    adapter: pathlib.Path | None = None
    """An adapter's directory."""
    tokens: int = 128
    """The most new tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token always."""
    top_k: int | None = None
    """Draw among so many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens whose probabilities reach this together."""
    seed: int = 0
    """Of the draws."""
    dtype: Type = "float32"
    """What the model computes in."""


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command: 0, 2 for a user's error, 130 after Ctrl-C."""
    config = tyro.cli(Command, args=arguments, prog="python -m jpeft", description=__doc__)
    commands: dict[type, Callable[[Any, Console], None]] = {
        Inspect: inspect,
        Merge: merge,
        Convert: convert,
        Quantize: quantize,
        Generate: generate,
    }
    try:
        commands[type(config)](config, Console())
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        print(f"jpeft: {e}", file=sys.stderr)
        return 2
    return 0


def inspect(config: Inspect, console: Console) -> None:
    """Print what a path holds; headers alone are read."""
    from jpeft.hf.files import Tensors, read_config, read_json

    path = config.directory
    if path.is_file():
        file = open_tensors(path)
        header = json.loads((file.metadata() or {}).get("jpeft", "{}"))
        if "transform" in header:
            console.print_json(json.dumps(header["transform"]))
        files = [path]
    elif (path / "adapter_config.json").is_file():
        about = read_json(path / "adapter_config.json")
        shown = {k: v for k, v in about.items() if v not in (None, [], {}, False)}
        console.print_json(json.dumps(shown))
        files = [path / "adapter_model.safetensors"]
        if not files[0].is_file():
            raise CheckpointError(f"{path} has no adapter_model.safetensors")
    else:
        about = read_config(path)
        console.print(f"model_type {about.get('model_type')}", highlight=False)
        quantised = about.get("quantization_config")
        if isinstance(quantised, dict):
            shown = {k: v for k, v in quantised.items() if not isinstance(v, list)}
            console.print(f"quantised: {json.dumps(shown)}; numbers as stored", highlight=False)
        files = Tensors(path).files
    if not console.is_terminal:
        console = Console(width=1000)  # a file or a pipe has no edge to fold names at
    console.print(_tensor_table(files))


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _tensor_table(files: list[pathlib.Path]) -> Table:
    """Tensors that differ in their layer's number alone are one row."""
    rows: dict[tuple[str, tuple[int, ...], str], int] = {}
    for path in files:
        file = open_tensors(path)
        for name in file.keys():  # noqa: SIM118
            piece = file.get_slice(name)
            key = (re.sub(r"\.\d+\.", ".*.", name), tuple(piece.get_shape()), piece.get_dtype())
            rows[key] = rows.get(key, 0) + 1
    table = Table()
    table.add_column("tensor", overflow="fold")
    for column in ("count", "shape", "type", "parameters"):
        right = column in ("count", "parameters")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    total = size = 0
    for (name, shape, kind), count in rows.items():
        n = count
        for s in shape:
            n *= s
        total, size = total + n, size + n * _BYTES.get(kind, 1)
        table.add_row(escape(name), str(count), " x ".join(map(str, shape)), kind, f"{n:,}")
    table.caption = f"{total:,} parameters, {size / 2**20:,.1f} MiB"
    return table


def merge(config: Merge, console: Console) -> None:
    """Load, rewrite, merge, write."""
    import jpeft
    from jpeft.hf.adapters import whole
    from jpeft.hf.models import copy_tokenizer
    from jpeft.hf.opened import adapter_of, open_model

    if (config.out / "config.json").exists() and not config.overwrite:
        raise ValueError(f"{config.out} holds a model: pass --overwrite, or another --out")
    opened = open_model(config.model, config.dtype)
    apply, params = jpeft.functional(opened.model)
    transform, state = adapter_of(opened, config.adapter, params, _uses(apply, params))
    lacking = sorted({*opened.new} - whole(transform, state))
    if lacking:
        head = "the merged classifier would be drawn at random: neither"
        raise CheckpointError(listed(f"{head} {config.model} nor {config.adapter} has", lacking))
    try:
        merged = jpeft.merge(transform.rewrite(params, state))
    except jpeft.LeafError as e:
        raise ValueError(
            f"{config.adapter} has what has no place in the weights, such as a prompt or a prefix: "
            "use generate --adapter"
        ) from e
    opened.save(config.out, merged)
    copy_tokenizer(config.model, config.out)
    console.print(f"written to {config.out}", highlight=False)


def convert(config: Convert, console: Console) -> None:
    """Read one format, write the other."""
    import jpeft
    from jpeft.hf import save_adapter
    from jpeft.hf.adapters import whole
    from jpeft.hf.opened import adapter_of, open_model

    if config.out.exists() and not config.overwrite:
        raise ValueError(f"{config.out} stands already: pass --overwrite, or another --out")
    if config.out.exists() and config.out.is_dir() == config.adapter.is_dir():
        kinds = ("directory", "file") if config.out.is_dir() else ("file", "directory")
        raise ValueError(
            f"{config.out} is a {kinds[0]}, and {config.adapter} becomes a {kinds[1]}: pass "
            "another --out"
        )
    opened = open_model(config.model)
    apply, params = jpeft.functional(opened.model)
    uses = _uses(apply, params)
    if config.adapter.is_dir():
        transform, state = adapter_of(opened, config.adapter, params, uses)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        jpeft.save(config.out, state, transform)
    else:
        transform, state = jpeft.restore(config.adapter, params, uses=uses)
        kind = type(opened.model).__name__
        task = "SEQ_CLS" if "Sequence" in kind else "SEQ_2_SEQ_LM" if kind == "T5" else "CAUSAL_LM"
        if {*opened.new} - whole(transform, state):
            task = "FEATURE_EXTRACTION"  # of SEQ_CLS PEFT has the head in the file
        about: dict[str, Any] = {"base_model_name": str(config.model), "task_type": task}
        about["config"] = opened.model.config
        save_adapter(config.out, transform, state, params, opened.family, uses=uses, **about)
    console.print(f"written to {config.out}", highlight=False)


def quantize(config: Quantize, console: Console) -> None:
    """Quantise while reading, and write."""
    import jax

    import jpeft
    from jpeft.hf import save_quantized
    from jpeft.hf.files import read_config
    from jpeft.hf.models import copy_tokenizer
    from jpeft.hf.opened import label_names, open_model
    from jpeft.paths import flatten

    if (config.out / "config.json").exists() and not config.overwrite:
        raise ValueError(f"{config.out} holds a model: pass --overwrite, or another --out")
    how = jpeft.Quantize(config.targets, config.format, config.block, config.double)
    opened = open_model(config.model, config.dtype, how)
    _, params = jpeft.functional(opened.model)
    # What the model has not is not there in the new one either.
    own = {path: x for path, x in flatten(params).items() if path not in opened.new}
    names = label_names(read_config(config.model))
    save_quantized(opened.model, config.out, own, id2label=names)
    copy_tokenizer(config.model, config.out)
    if config.error:
        dense = jpeft.functional(open_model(config.model, config.dtype).model).params
        table = Table("weight", "mean error / rms", "mean relative error", "bits")
        for path, e in jpeft.quantization_error(dense, params).items():
            table.add_row(path, f"{e.absolute:.4f}", f"{e.relative:.4f}", f"{e.bits:.3f}")
        console.print(table)
    wide = sum(x.size * x.dtype.itemsize for x in flatten(params).values())
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    console.print(
        f"{wide / 2**20:,.1f} MiB in {config.dtype}, {size / 2**20:,.1f} MiB now; written to "
        f"{config.out}",
        highlight=False,
    )


def generate(config: Generate, console: Console) -> None:
    """Stream a continuation."""
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer

    import jpeft
    from jpeft.hf import load_adapter, load_model
    from jpeft.hf.models import read_kind, stop_tokens
    from jpeft.models.t5 import T5, decoder_steps

    del console
    vocabulary = config.model / "tokenizer.json"
    if not vocabulary.is_file():
        raise CheckpointError(f"{config.model} has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(vocabulary))
    kind, _ = read_kind(config.model)
    model, _ = load_model(config.model, dtype=config.dtype)
    apply, params = jpeft.functional(model)
    ids = jnp.asarray([tokenizer.encode(config.prompt).ids], jnp.int32)
    if not ids.size:
        raise ValueError("--prompt has no tokens")
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids)}
    tree = steps = params
    if config.adapter is not None:
        uses = _uses(apply, params)
        transform, state = load_adapter(
            config.adapter, params, kind.family, uses=uses, config=model.config
        )
        tree = transform.rewrite(params, state)
        steps = transform.decoding().rewrite(params, state)
        room = jpeft.room(transform)
        if room:
            first = jpeft.first_virtual_id(transform, model.config.vocab_size)
            batch = jpeft.virtual_tokens(batch, length=room, first=first)
    ids, mask, extra = batch["input_ids"], batch["attention_mask"], {}
    if isinstance(model, T5):
        encoded = jax.jit(jpeft.lift(apply))(tree, ids, mask)
        extra = {"encoded": encoded, "encoder_mask": mask}
        ids = jnp.full((1, 1), model.config.decoder_start_token_id, jnp.int32)
        apply, mask = decoder_steps(apply), jnp.ones_like(ids)
    sampling = jpeft.Sampling(config.temperature, config.top_k, config.top_p)
    pieces = jpeft.stream(
        apply,
        tree,
        ids,
        mask,
        cache=model.empty_cache(1, ids.shape[1] + config.tokens),
        new_tokens=config.tokens,
        sampling=sampling,
        stop=stop_tokens(config.model),
        key=jax.random.key(config.seed),
        decode_params=steps,
        extra=extra,
    )
    new: list[int] = []
    told = ""
    for piece in pieces:
        new.append(int(piece[0]))
        text = tokenizer.decode(new)
        # A character of several tokens is not there before its last one.
        if not text.endswith("\ufffd"):
            print(text.removeprefix(told), end="", flush=True)
            told = text
    print()


def _uses(apply: Any, params: Any) -> Any:
    import jax.numpy as jnp

    import jpeft

    ids = jnp.zeros((1, 4), jnp.int32)
    more = {"decoder_input_ids": ids} if "decoder" in params else {}
    return jpeft.uses(apply, params, ids, **more)
