"""The rows of a comparison with HF PEFT: which model, method, numbers and batch; presets."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from experiments.common.models import ModelError, fetch_model

Method = Literal["full", "lora", "lora_all", "adapter", "prefix", "qlora"]
Numbers = Literal["fp32", "bf16"]
Preset = Literal["cpu", "gpu"]
METHODS: tuple[Method, ...] = get_args(Method)
NUMBERS: tuple[Numbers, ...] = get_args(Numbers)
# Random weights of these shapes; other names are of experiments/common/named.py.
SHAPES = ("shape", "gpt2")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
ENCODERS = ("bert", "roberta")
# Added to a model's memory and flops by a method, as HF PEFT's own examples have them.
RANK, ALPHA, BOTTLENECK, PREFIX = 8, 16.0, 64, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a training step of `batch` x `length` tokens.

    **Attributes:** `remat`, whether both sides forget activations and compute them again.
    """

    model: str
    method: Method
    precision: Numbers
    batch: int
    length: int
    remat: bool = False

    @property
    def shape(self) -> str:
        """BATCHxLENGTH."""
        return f"{self.batch}x{self.length}"

    @property
    def name(self) -> str:
        """What a user calls the row."""
        name = pathlib.Path(self.model).name
        return f"{name}, {self.method}, {self.precision}, {self.shape}"


@dataclasses.dataclass(frozen=True)
class Generation:
    """Greedy generation: `rows` prompts of `prompt` tokens, `new` tokens after each."""

    rows: int
    new: int
    prompt: int

    @property
    def shape(self) -> str:
        """ROWSxNEW."""
        return f"{self.rows}x{self.new}"


def pair(option: str, text: str) -> tuple[int, int]:
    """`32x64` as two numbers. **Raises:** `ValueError` that names the option."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"{option} {text}: this is two numbers, as in 32x64")
    return int(found[1]), int(found[2])


def product(
    models: Sequence[str],
    methods: Sequence[Method],
    precisions: Sequence[Numbers],
    shapes: Sequence[str],
    remat: bool,
) -> list[Case]:
    """Every model by every precision, shape and method."""
    return [
        Case(model, method, precision, *pair("--shapes", shape), remat)
        for model, precision, shape, method in itertools.product(
            models, precisions, shapes, methods
        )
    ]


def preset(name: Preset) -> list[Case]:
    """The rows that are measured when none is asked for; those that say most come first."""
    if name == "cpu":
        others: list[Method] = [m for m in METHODS[:5] if m != "lora"]
        return [
            *product(["minilm"], METHODS[:5], ["fp32"], ["32x64"], False),
            *product(["minilm"], ["lora"], ["fp32"], ["32x128"], False),
            *product(["gpt2"], METHODS[:3], ["fp32"], ["8x128"], False),
            # Few rows: a CPU without bf16 takes the peer half a minute for a step of 32.
            *product(["minilm"], ["lora"], ["fp32", "bf16"], ["8x64"], False),
            *product(["minilm"], others, ["fp32"], ["32x128"], False),
        ]
    methods: tuple[Method, ...] = ("lora", "lora_all", "qlora")
    rest: list[Method] = [m for m in METHODS if m != "lora"]
    # A card that holds the model holds these batches' activations too: nothing is made twice.
    return [
        *product(["llama-3.2-1b"], methods[:1], ["bf16"], ["4x2048"], False),
        *product(["llama-3-8b"], methods, ["bf16"], ["1x2048"], False),
        *product(["llama-3.2-1b"], rest, ["bf16"], ["4x2048"], False),
    ]


def is_stored(name: str) -> bool:
    """Whether a model has files of its own: a directory, or a repository of the hub."""
    return pathlib.Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def check_model(name: str) -> str:
    """The `model_type` of a model, before anything runs; a repository is fetched.

    **Raises:** `ModelError` for an unknown name, or a model that is neither an encoder nor a
    decoder of this package.
    """
    from experiments.common.named import NAMED
    from jpeft._near import did_you_mean
    from jpeft.hf.files import read_config

    if name in ("minilm", "shape"):
        return "bert"
    if name == "gpt2":
        return "gpt2"
    if is_stored(name):
        kind = str(read_config(fetch_model(name)).get("model_type"))
        if kind not in (*ENCODERS, *DECODERS):
            known = ", ".join((*ENCODERS, *DECODERS))
            raise ModelError(f"--models {name} is of type '{kind}': there are {known}")
        return kind
    if name in NAMED:
        return str(NAMED[name]["model_type"])
    names = ("minilm", *SHAPES, *NAMED)
    raise ModelError(
        f"--models {name}: there is no such model or directory"
        f"{did_you_mean(name, names) or '.'} By name there are {', '.join(names)}"
    )


def check(case: Case, kinds: Mapping[str, str], generation: Generation | None) -> None:
    """**Raises:** `ValueError` for a row that the model has not the positions for.

    **Arguments:** `kinds`, each model's `model_type`.
    """
    if is_stored(case.model):
        limit = positions(fetch_model(case.model) / "config.json")
    else:
        limit = {"gpt2": 1024, "bert": 512}.get(kinds[case.model])
    room = PREFIX if case.method == "prefix" else 0
    if limit is not None and case.length + room > limit:
        more = f" and {room} of the prefix" if room else ""
        raise ValueError(
            f"{case.name}: {case.length} tokens{more} are more than the model's {limit} positions"
        )
    if generation is not None and limit is not None and kinds[case.model] in DECODERS:
        total = generation.prompt + generation.new + room
        if total > limit:
            raise ValueError(
                f"{case.name}: --prompt and the tokens of --generation are {total} with what the "
                f"method adds, more than the model's {limit} positions"
            )


def positions(path: pathlib.Path) -> int | None:
    """How many positions a `config.json` has a table for; None where they are computed."""
    from jpeft.hf.files import read_json

    raw: dict[str, Any] = read_json(path)
    if raw.get("model_type") == "gpt2":
        return int(raw.get("n_positions", 1024))
    if raw.get("model_type") in ENCODERS:
        own = int(raw.get("max_position_embeddings", 512))
        return own - (raw["model_type"] == "roberta") * (1 + int(raw.get("pad_token_id", 1)))
    return None
