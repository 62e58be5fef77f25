"""Every method on this package's encoders, with settings that train well on a small task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

import jpeft

Method = Literal[
    "full",
    "head",
    "top",
    "lora",
    "rslora",
    "dora",
    "dylora",
    "adapter",
    "pfeiffer",
    "parallel_adapter",
    "prompt",
    "prefix",
    "subspace",
    "said",
    "ia3",
    "bitfit",
]
PromptStart = Literal["uniform", "vocabulary"]
METHODS: tuple[Method, ...] = get_args(Method)
# Of the model that the rates were found on.
_WIDTH = 384
HEAD = jpeft.Train(r"^classifier/")
KEYS_AND_VALUES = r"attention/self/(key|value)/"
PROJECTIONS = r"output/dense/bias$"
LAST_PROJECTION = r"layer/output/dense/"
LINEAR = r"encoder/layer/.*kernel$"
WORDS = r"word_embeddings/embedding$"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the methods are built from, as the command line has it."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"(query|value)/kernel$",)
    lora_dropout: float = 0.0
    bottleneck: int = 64
    prompt: int = 20
    dimensions: int = 2000
    top: int = 2
    prompt_start: PromptStart = "vocabulary"
    words: tuple[int, int] = (1996, 6996)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method's transform, learning rate, and the positions that it adds to the input.

    **Attributes:** `rate`, AdamW's peak, of a model 384 wide; `decay`, its weight decay; `room`,
    virtual tokens, which stand after the first token; `matrices`, whether what is trained are
    matrices, whose rate falls with the width (Yang et al. 2022), and not vectors, whose stays.
    """

    transform: Callable[[Sizes], jpeft.Transform]
    rate: float
    decay: float = 0.01
    room: Callable[[Sizes], int] = lambda sizes: 0
    matrices: bool = True

    def rate_at(self, width: int) -> float:
        """The peak rate for a model of this width, at most four times the one given."""
        return self.rate * (min(4.0, _WIDTH / width) if self.matrices else 1.0)


def _lora(s: Sizes, **options: Any) -> jpeft.LoRA:
    return jpeft.LoRA(s.rank, s.alpha, s.targets, dropout=s.lora_dropout, **options)


def _with_head(build: Callable[[Sizes], jpeft.Transform]) -> Callable[[Sizes], jpeft.Transform]:
    # The head comes first: a method on the whole tree moves what it has trained.
    return lambda sizes: jpeft.chain(HEAD, build(sizes))


def _prompt(s: Sizes) -> jpeft.Transform:
    return jpeft.PromptTuning(s.prompt, WORDS, s.prompt_start, s.words)


RECIPES: Mapping[Method, Recipe] = {
    "full": Recipe(lambda s: jpeft.Train(r".*"), 2e-4),
    "head": Recipe(lambda s: HEAD, 1e-2),
    "top": Recipe(_with_head(lambda s: jpeft.Train(r"encoder/layer/", last=s.top)), 5e-4),
    "lora": Recipe(_with_head(_lora), 2e-3),
    "rslora": Recipe(_with_head(lambda s: _lora(s, rslora=True)), 1e-3),
    "dora": Recipe(_with_head(lambda s: _lora(s, dora=True)), 2e-3),
    "dylora": Recipe(
        _with_head(lambda s: jpeft.DyLoRA(s.rank, s.alpha, s.targets, dropout=s.lora_dropout)), 2e-3
    ),
    "adapter": Recipe(
        lambda s: jpeft.chain(HEAD, jpeft.houlsby(s.bottleneck, PROJECTIONS, r"LayerNorm/")), 1e-3
    ),
    "pfeiffer": Recipe(
        _with_head(lambda s: jpeft.pfeiffer(s.bottleneck, LAST_PROJECTION + "bias$")), 1e-3
    ),
    "parallel_adapter": Recipe(
        _with_head(lambda s: jpeft.parallel_adapter(s.bottleneck, LAST_PROJECTION + "kernel$")),
        1e-3,
    ),
    "prompt": Recipe(_with_head(_prompt), 3e-2, 0.0, lambda s: s.prompt, matrices=False),
    "prefix": Recipe(
        _with_head(lambda s: jpeft.PrefixTuning(s.prompt, KEYS_AND_VALUES + "bias$", after=1)),
        5e-2,
        0.0,
        lambda s: s.prompt,
        matrices=False,
    ),
    "subspace": Recipe(lambda s: jpeft.Subspace(s.dimensions), 1e-1, 0.0, matrices=False),
    "said": Recipe(
        lambda s: jpeft.Subspace(s.dimensions, scales="layer"), 1e-1, 0.0, matrices=False
    ),
    "ia3": Recipe(
        _with_head(lambda s: jpeft.IA3(KEYS_AND_VALUES + "kernel$", LAST_PROJECTION + "kernel$")),
        1e-2,
        0.0,
        matrices=False,
    ),
    "bitfit": Recipe(
        lambda s: jpeft.chain(HEAD, jpeft.bitfit(r"^(?!classifier/).*bias$")), 2e-3, matrices=False
    ),
}


def make_room(batch: Mapping[str, Any], length: int, first: int) -> dict[str, Any]:
    """A batch with `length` virtual tokens after each row's first token, and the `pooling_mask` of
    its own tokens; without any, the batch.
    """
    if not length:
        return dict(batch)
    longer = jpeft.virtual_tokens(dict(batch), length=length, first=first, after=1)
    mask = jnp.asarray(batch["attention_mask"])
    gap = jnp.zeros((mask.shape[0], length), mask.dtype)
    return longer | {"pooling_mask": jnp.concatenate([mask[:, :1], gap, mask[:, 1:]], axis=1)}


def called_with(method: Method, length: int) -> dict[str, Any]:
    """What else the model is called with on such batches: a prefix's positions have keys and values
    alone, a prompt's are tokens as any others.
    """
    return {"idle": (1, 1 + length)} if method == "prefix" else {}
