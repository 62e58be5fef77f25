"""Language models for experiments: where they come from, and every method's places in them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray
from rich.console import Console

import jpeft
from experiments.common.methods import Method, Recipe, Sizes
from experiments.common.models import ModelError, fetch_model
from experiments.common.numbers import Quantised
from experiments.common.texts import (
    BYTES,
    Codec,
    byte_codec,
    hugging_face_codec,
    llama2c_codec,
)
from jpeft.hf import Family, load_model
from jpeft.hf.models import LLAMA, read_kind
from jpeft.models.gpt2 import Gpt2
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.llama2c import load_llama2c
from jpeft.models.t5 import T5

TINY = LlamaConfig(
    vocab_size=BYTES,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Patterns of a model's parameters.

    **Attributes:** `lora`, what LoRA updates; `kv`, what makes keys and values; `kv_bias`, where
    prefixes stand; `out`, the projections of attention and MLP back to the residual stream; `down`,
    the MLP's alone; `words`; `norms`; `linear`, every linear layer but the head; `parts`, LoRA's of
    a fused kernel.
    """

    lora: str
    kv: str
    kv_bias: str
    out: str
    down: str
    words: str
    norms: str
    linear: str
    parts: tuple[tuple[str, tuple[int, tuple[int, ...]]], ...] = ()


LAYOUTS: dict[type, Layout] = {
    Llama: Layout(
        r"self_attn/[qv]_proj/kernel$",
        r"self_attn/[kv]_proj/kernel$",
        r"self_attn/[kv]_proj/kernel$",
        r"(o_proj|down_proj)/kernel$",
        r"down_proj/kernel$",
        r"embed_tokens/embedding$",
        r"norm/scale$",
        r"_proj/kernel$",
    ),
    Gpt2: Layout(
        r"attn/c_attn/kernel$",
        r"attn/c_attn/kernel$",
        r"attn/c_attn/bias$",
        r"c_proj/bias$",
        r"mlp/c_proj/kernel$",
        r"wte/embedding$",
        r"ln_\w+/(scale|bias)$",
        r"(c_attn|c_proj|c_fc)/kernel$",
        # Separate updates of q and v in the kernel that makes q, k and v, as the paper has them.
        ((r"c_attn/kernel$", (3, (0, 2))),),
    ),
    T5: Layout(
        r"/[qv]/kernel$",
        r"SelfAttention/[kv]/kernel$",
        r"encoder/.*SelfAttention/[kv]/kernel$",
        r"(Attention/o|DenseReluDense/wo)/kernel$",
        r"DenseReluDense/wo/kernel$",
        r"shared/embedding$",
        r"layer_norm/scale$",
        r"(Attention|DenseReluDense)/.*kernel$",
    ),
}


def recipes(model: Any) -> dict[Method, Recipe]:
    """Every method on a language model, with a learning rate; `head` and `top` are classifiers'."""
    at = LAYOUTS[type(model)]
    words = (3, min(5003, model.config.vocab_size))

    def targets(s: Sizes) -> tuple[str, ...]:
        return s.targets or (at.lora,)

    def lora(s: Sizes, **options: Any) -> jpeft.LoRA:
        parts = {} if s.targets else dict(at.parts)
        return jpeft.LoRA(
            s.rank, s.alpha, targets(s), dropout=s.lora_dropout, parts=parts, **options
        )

    return {
        "full": Recipe(lambda s: jpeft.Train(r".*"), 3e-4),
        "lora": Recipe(lora, 2e-3),
        "rslora": Recipe(lambda s: lora(s, rslora=True), 1e-3),
        "dora": Recipe(lambda s: lora(s, dora=True), 2e-3),
        "dylora": Recipe(
            lambda s: jpeft.DyLoRA(s.rank, s.alpha, targets(s), dropout=s.lora_dropout), 2e-3
        ),
        "adapter": Recipe(lambda s: jpeft.houlsby(s.bottleneck, at.out, at.norms), 1e-3),
        "pfeiffer": Recipe(lambda s: jpeft.pfeiffer(s.bottleneck, at.down), 1e-3),
        "parallel_adapter": Recipe(lambda s: jpeft.parallel_adapter(s.bottleneck, at.down), 1e-3),
        "prompt": Recipe(
            lambda s: jpeft.PromptTuning(s.prompt, at.words, s.prompt_start, words),
            3e-2,
            0.0,
            lambda s: s.prompt,
        ),
        "prefix": Recipe(
            lambda s: jpeft.PrefixTuning(s.prompt, at.kv_bias), 3e-2, 0.0, lambda s: s.prompt
        ),
        "subspace": Recipe(lambda s: jpeft.Subspace(s.dimensions), 1e-1, 0.0),
        "said": Recipe(lambda s: jpeft.Subspace(s.dimensions, scales="layer"), 1e-1, 0.0),
        "ia3": Recipe(lambda s: jpeft.IA3(at.kv, at.down), 1e-2, 0.0),
        "bitfit": Recipe(lambda s: jpeft.bitfit(r"bias$"), 2e-3),
    }


# Methods that train some of the model's own parameters, and start from what those are in fp32.
TRAINS_THE_MODEL: frozenset[Method] = frozenset({"full", "adapter", "bitfit"})


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A language model ready to train, with its tokenizer, its names in Hugging Face's files, and
    its directory, None where it is from elsewhere.
    """

    model: Any
    codec: Codec
    family: Family
    directory: pathlib.Path | None

    @property
    def two_sided(self) -> bool:
        """Whether there is an encoder."""
        return isinstance(self.model, T5)


def load(
    name: str,
    vocabulary: pathlib.Path | None,
    console: Console,
    *,
    dtype: Any,
    remat: Any,
    key: PRNGKeyArray,
    quantize: Quantised | None = None,
    param_dtype: Any = jnp.float32,
    **options: Any,
) -> Loaded:
    """A model by its name.

    **Arguments:** `name`, a Hugging Face directory, a name on the hub, a llama2.c file (with its
    `vocabulary`), or `tiny`: a small Llama over bytes, made here and knowing nothing; `remat`, as
    the models take it; `quantize`, what the linear layers of a directory
    are quantised to while they are read, so that the dense model is never held; `param_dtype`, what
    a directory's other parameters are held in; `options`, `load_model`'s of how a decoder computes:
    `unroll`, `implementation`.

    **Raises:** `ModelError`, `CheckpointError`.
    """
    path = pathlib.Path(name)
    if vocabulary is not None and not path.is_file():
        raise ModelError("--vocabulary goes with a --model in llama2.c's format")
    if name == "tiny":
        rngs = nnx.Rngs(key)
        tiny = Llama(TINY, rngs=rngs, dtype=dtype, remat=remat, **options)
        return Loaded(tiny, byte_codec(), LLAMA, None)
    if path.is_file():
        if vocabulary is None:
            raise ModelError(f"--model {name}: a llama2.c file needs --vocabulary")
        if not vocabulary.is_file():
            raise ModelError(f"--vocabulary {vocabulary}: there is no such file")
        model = load_llama2c(path, dtype=dtype, remat=remat, **options)
        return Loaded(model, llama2c_codec(vocabulary, model.config.vocab_size), LLAMA, None)
    directory = fetch_model(name, console)
    kind, _ = read_kind(directory)
    options |= {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    if quantize in ("nf4", "fp4", "int8"):
        # What is not quantised is frozen too: in the type that is computed in.
        options["param_dtype"] = dtype
        options["quantize"] = jpeft.Quantize(LAYOUTS[kind.model].linear, quantize)
    model, _ = load_model(directory, key=key, **options)
    family = kind.family
    return Loaded(model, hugging_face_codec(directory), family, directory)
