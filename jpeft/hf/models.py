"""Any model of this package from a Hugging Face directory, and back: one table of families."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from jpeft.functional import functional
from jpeft.hf.checkpoints import (
    bert_family,
    classifier_config,
    load_module,
)
from jpeft.hf.files import CheckpointError, read_config, read_json, write
from jpeft.hf.names import Family, places
from jpeft.hf.params import LoadReport, lazy_tensors
from jpeft.hf.quantized_files import describe, lazy_leaves, without_quantization
from jpeft.models import t5
from jpeft.models.bert import BertForSequenceClassification
from jpeft.models.causal import Implementation
from jpeft.models.gpt2 import Gpt2
from jpeft.models.gpt2_config import Gpt2Config
from jpeft.models.llama import Llama
from jpeft.models.llama_config import LlamaConfig
from jpeft.models.t5_config import T5Config
from jpeft.paths import flatten
from jpeft.quantize import Quantize


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model of ours for a `model_type`: its configuration, its class, its names in files."""

    config: Any
    model: Any
    family: Family


LLAMA = Family(
    stacks=("model/layers",),
    prefix="model.",
    ignored=r"rotary_emb\.",  # buffers
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    untied="set tie_word_embeddings to false in config.json to have it read",
)
GPT2 = Family(
    stacks=("transformer/h",),
    prefix="transformer.",
    conv1d=r"/(c_attn|c_proj|c_fc)/kernel$",
    ignored=r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",
    copies={"lm_head.weight": "transformer.wte.weight"},
    untied="a GPT-2 with a head of its own is not supported",
)
_BUCKETS = "relative_attention_bias"
T5 = Family(
    stacks=("encoder/block", "decoder/block"),
    ignored=rf"EncDecAttention\.{_BUCKETS}\.weight$",
    copies=dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "shared.weight",
    ),
    untied="only a T5 with tie_word_embeddings false has a second table, its head",
    # transformers 5 ties the head of v1.1 too, without saying so in config.json.
    shared={"lm_head.weight": "shared.weight"},
    # One table for all layers, which the file has in the first.
    special={
        f"{side}/{_BUCKETS}/embedding": f"{side}.block.0.layer.0.SelfAttention.{_BUCKETS}.weight"
        for side in ("encoder", "decoder")
    },
)
KINDS: dict[str, Kind] = {
    "gpt2": Kind(Gpt2Config, Gpt2, GPT2),
    "t5": Kind(T5Config, t5.T5, T5),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"),
        Kind(LlamaConfig, Llama, LLAMA),
    ),
}


def load_model(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: Any = False,
    unroll: int = 1,
    implementation: Implementation = None,
    sharding: Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding] | None = None,
    key: PRNGKeyArray | None = None,
    quantize: Quantize | None = None,
) -> tuple[Any, LoadReport]:
    """The language model in a directory, by its `config.json`'s `model_type`.

    A directory of `save_quantized`, or one with 4-bit weights of bitsandbytes, gives a model with
    those weights as `jpeft.Quantized` leaves; so does `quantize`. Such a model is run through
    `jpeft.functional` and `jpeft.lift`, not called itself.

    **Arguments:** `dtype`, what it computes in; `param_dtype`, what its parameters are cast to
    while they are read, `dtype` where left out; `implementation`, of a decoder's attention:
    `cudnn` is flash attention on NVIDIA GPUs, in bf16 and without soft caps; `sharding`, each
    parameter's from its path and shape; `key`, for what the file lacks and may lack; `quantize`,
    which weights are quantised while they are read, and how: neither host nor devices ever hold
    the dense model. A quantised weight's `sharding` is the dense one's.

    **Raises:** `CheckpointError` for an unknown `model_type` or option, and with every missing,
    unexpected, misshapen and mistyped tensor; `TargetError` for a pattern of `quantize` that
    matches nothing, or no kernel; `ValueError` for an `implementation` of T5, for a sharding that
    cuts a quantised weight within its blocks, or puts its layers on different devices.
    """
    directory = pathlib.Path(directory)
    kind, config = read_kind(directory)
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "unroll": unroll}
    options["param_dtype"] = dtype if param_dtype is None else param_dtype
    if implementation is not None:
        if kind.model is t5.T5:
            raise ValueError(f"implementation='{implementation}': T5's attention has one only")
        options["implementation"] = implementation

    def build(rngs: nnx.Rngs) -> Any:
        return kind.model(config, rngs=rngs, **options)

    key = jax.random.key(0) if key is None else key
    return load_module(directory, build, key, kind.family, sharding, quantize)


def read_kind(directory: pathlib.Path) -> tuple[Kind, Any]:
    """A directory's entry of `KINDS`, and its configuration. **Raises:** `CheckpointError`."""
    raw = without_quantization(directory, read_config(directory))
    name = raw.get("model_type")
    if name not in KINDS:
        raise CheckpointError(
            f"{directory} holds a model of type '{name}': there are {', '.join(KINDS)}, and with a "
            "classifier bert and roberta (load_sequence_classifier)"
        )
    try:
        return KINDS[name], KINDS[name].config.from_hf(raw)
    except (ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{directory / 'config.json'}: {e}") from e


def save_model(
    model: Any,
    directory: str | pathlib.Path,
    params: Any = None,
    *,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """A directory that transformers loads: `config.json` and safetensors. Quantised weights are
    written as the dense ones that they stand for.

    **Arguments:** `params`, ordinary parameters to write in place of the model's own, such as
    merged ones; `shard_bytes`, the most that one file holds.

    **Raises:** `OSError` when it cannot be written, and then nothing is.
    """
    params = functional(model).params if params is None else params
    config = model.config.to_hf()
    family = KINDS[config["model_type"]].family
    config["dtype"] = str(next(iter(flatten(params).values())).dtype)
    write(pathlib.Path(directory), config, lazy_tensors(params, family), shard_bytes)


def save_quantized(
    model: Any,
    directory: str | pathlib.Path,
    params: Any = None,
    *,
    id2label: Mapping[int, str] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """A directory with quantised weights as they are, in our own layout: `load_model` (for a
    classifier `load_sequence_classifier`) gives them back bit for bit.

    **Arguments:** `params`, parameters to write in place of the model's own; `id2label`, a
    classifier's labels; `shard_bytes`, the most that one file holds.

    **Raises:** `ValueError` for parameters without quantised weights, with weights in several
    formats, or with other rewritten leaves; `OSError` when it cannot be written, and then nothing
    is.
    """
    params = functional(model).params if params is None else params
    about = describe(params)
    if isinstance(model, BertForSequenceClassification):
        config = classifier_config(model, params, id2label)
        family = bert_family(model.config.model_type)
    else:
        config = model.config.to_hf()
        family = KINDS[config["model_type"]].family
        config["dtype"] = str(next(iter(flatten(params).values())).dtype)
    tensors = lazy_leaves(params, places(family, flatten(params)))
    write(pathlib.Path(directory), config | {"quantization_config": about}, tensors, shard_bytes)


def stop_tokens(directory: str | pathlib.Path) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` of `generation_config.json`, or of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(directory) / name
        if path.is_file():
            found = read_json(path).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens.json", "*.model"),
    *("chat_template*", "additional_chat_templates/*", "generation_config.json"),
)


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """A model's tokenizer, chat templates and generation settings, into another directory."""
    for pattern in _TOKENIZER:
        for path in source.glob(pattern):
            to = target / path.relative_to(source)
            if path.is_file() and path.resolve() != to.resolve():
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, to)
