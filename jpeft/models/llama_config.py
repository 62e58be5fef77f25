"""The shape of a Llama-like decoder, read from Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jpeft.models.layers import ACTIVATIONS
from jpeft.models.options import check_options
from jpeft.models.rope import Rope

_GEMMA: dict[str, Any] = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What transformers takes for options that a file leaves out, where it is not our default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {
        **_GEMMA,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
    },
}
# What JSON may have as whole numbers.
_FLOATS = {
    "rms_norm_eps",
    "initializer_range",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, Mistral, Qwen 2 or 3, Gemma 2 or 3, by Hugging Face's names.

    **Attributes:** `rope`, the rotary embedding; `local_rope`, that of Gemma 3's layers with a
    sliding window; `layer_types`, for each layer `full_attention` or `sliding_attention`, all of
    one kind by default. What else distinguishes the families follows from `model_type`.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 11008
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()
    local_rope: Rope | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_pre_attn_scalar: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.model_type not in DEFAULTS:
            raise ValueError(
                f"model_type is '{self.model_type}': this is the model of {', '.join(DEFAULTS)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act '{self.hidden_act}' is not supported: one of {', '.join(ACTIVATIONS)}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into "
                f"{self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads do not share {self.kv_heads} key-value heads"
            )
        if self.width % 2:
            raise ValueError(f"head_dim is even, as rotary embeddings are pairs: got {self.width}")
        for kind in self.layer_types or ():
            if kind not in (FULL, SLIDING):
                raise ValueError(f"layer type '{kind}' is not supported: {FULL} or {SLIDING}")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"{self.num_hidden_layers} layers"
            )
        if SLIDING in self.kinds and self.sliding_window is None:
            raise ValueError(f"layer type '{SLIDING}' needs sliding_window")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From the contents of a `config.json`; a Gemma 3 with images gives its text model.

        **Raises:** `ValueError` that names an option that this model does not have.
        """
        if config.get("model_type") == "gemma3" and "text_config" in config:
            top = {k: v for k, v in config.items() if k == "tie_word_embeddings"}
            config = {**top, **config["text_config"], "model_type": "gemma3_text"}
        kind = config.get("model_type", "llama")
        if kind not in DEFAULTS:
            raise ValueError(f"model_type is '{kind}': this is the model of {', '.join(DEFAULTS)}")
        merged = {**DEFAULTS[kind], **config}
        names = {f.name for f in dataclasses.fields(cls)}
        check_options(merged, names | _READ, _ONLY)
        own: dict[str, Any] = {k: v for k, v in merged.items() if k in names}
        own["model_type"] = kind
        if kind.startswith("gemma"):
            # Gemma's files may have a hidden_act too, which its models do not read.
            own["hidden_act"] = merged["hidden_activation"]
        else:
            own.pop("query_pre_attn_scalar", None)
        if kind == "gemma3_text":
            # Gemma 3's files may have one, which its models do not read.
            own["attn_logit_softcapping"] = None
        for name in _FLOATS & own.keys():
            own[name] = None if own[name] is None else float(own[name])
        if isinstance(own.get("eos_token_id"), list):
            own["eos_token_id"] = tuple(own["eos_token_id"])
        layers = own.get("num_hidden_layers", cls.num_hidden_layers)
        own["sliding_window"] = _window(kind, merged)
        own["layer_types"] = _layer_types(kind, merged, layers, own["sliding_window"])
        own.setdefault("max_position_embeddings", cls.max_position_embeddings)
        own |= _ropes(kind, merged, own["max_position_embeddings"])
        out = cls(**own)
        return dataclasses.replace(out, head_dim=out.width, num_key_value_heads=out.kv_heads)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads, whichever its version."""
        out = dataclasses.asdict(self)
        for name in ("rope", "local_rope", "layer_types", "sliding_window"):
            del out[name]
        out["architectures"] = [_ARCHITECTURES[self.model_type]]
        out["num_key_value_heads"], out["head_dim"] = self.kv_heads, self.width
        out["rope_theta"], out["rope_scaling"] = self.rope.rope_theta, self.rope.to_hf()
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        if self.model_type != "llama":
            out["sliding_window"] = self.sliding_window
        if self.model_type.startswith("qwen"):
            out["use_sliding_window"] = self.sliding_window is not None
        if self.model_type not in ("llama", "mistral"):
            out["layer_types"] = list(self.kinds)
        if self.gemma:
            out["hidden_activation"] = out.pop("hidden_act")
        else:
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                del out[name]
            del out["query_pre_attn_scalar"]
        if self.local_rope is not None:
            out["rope_local_base_freq"] = self.local_rope.rope_theta
        return out

    def extended(self, length: int) -> LlamaConfig:
        """For texts of `length` tokens: rotary positions interpolated linearly, by
        `ceil(length / max_position_embeddings)`; itself where that is no longer.

        Gemma 3's layers with a sliding window read no further than before: theirs stay.

        **Raises:** `ValueError` where the positions are scaled already.

        Source: Chen et al. 2023 (position interpolation); Chen et al. 2024 trains LongLoRA so.
        """
        trained = self.max_position_embeddings
        if length <= trained:
            return self
        if self.rope.rope_type != "default":
            raise ValueError(
                f"rotary positions are scaled already ('{self.rope.rope_type}'): only a config "
                "without a scaling can be extended"
            )
        factor = float(math.ceil(length / trained))
        rope = dataclasses.replace(self.rope, rope_type="linear", factor=factor)
        return dataclasses.replace(self, rope=rope, max_position_embeddings=length)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return (
            self.num_attention_heads
            if self.num_key_value_heads is None
            else self.num_key_value_heads
        )

    @property
    def width(self) -> int:
        """Of one head."""
        return (
            self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each layer's type."""
        if self.layer_types is not None:
            return self.layer_types
        return (FULL if self.sliding_window is None else SLIDING,) * self.num_hidden_layers

    @property
    def gemma(self) -> bool:
        """Whether norms multiply with `1 + scale` and stand on both sides of attention and MLP, and
        embeddings are multiplied with `sqrt(hidden_size)`.
        """
        return self.model_type.startswith("gemma")

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, head by head."""
        return self.model_type in ("qwen3", "gemma3_text")

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.model_type == "qwen2" or self.o_bias

    @property
    def o_bias(self) -> bool:
        """Whether attention's output has a bias."""
        return self.attention_bias and self.model_type not in ("qwen2", "mistral")

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied with."""
        return (self.query_pre_attn_scalar or self.width) ** -0.5


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


_ONLY: dict[str, Any] = {
    "attention_dropout": 0.0,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
# Read by name, beside the fields.
_READ = {
    "hidden_activation",
    "max_window_layers",
    "original_max_position_embeddings",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
    "use_sliding_window",
}


def _window(kind: str, config: Mapping[str, Any]) -> int | None:
    """The sliding window, where the family's models read it."""
    if kind == "llama" or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return None
    return config.get("sliding_window")


def _layer_types(
    kind: str, config: Mapping[str, Any], layers: int, window: int | None
) -> tuple[str, ...] | None:
    given = config.get("layer_types")
    if kind in ("llama", "mistral"):
        # transformers ignores them in these families: what it would not follow is refused.
        uniform = FULL if window is None else SLIDING
        if given and any(x != uniform for x in given):
            raise ValueError(f"layer_types is not supported for '{kind}': all are {uniform}")
        return None
    if given:
        return tuple(given)
    if kind.startswith("qwen"):
        first = layers if window is None else config.get("max_window_layers", 28)
        return tuple(SLIDING if i >= first else FULL for i in range(layers))
    if window is None:
        return None
    every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    every = 2 if kind == "gemma2" else every
    return tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))


def _ropes(kind: str, config: Mapping[str, Any], longest: int) -> dict[str, Rope]:
    """`rope` and `local_rope`, from `rope_scaling` or from transformers 5's `rope_parameters`."""
    theta = config.get("rope_theta") or 10000.0
    original = config.get("original_max_position_embeddings")

    def read(options: Mapping[str, Any] | None, theta: float) -> Rope:
        return Rope.from_hf(options, theta=theta, longest=longest, original=original)

    if kind != "gemma3_text":
        return {"rope": read(config.get("rope_scaling") or config.get("rope_parameters"), theta)}
    options = config.get("rope_parameters") or {}
    overall = {**(options.get(FULL) or {}), **(config.get("rope_scaling") or {})}
    local = read(options.get(SLIDING), config.get("rope_local_base_freq") or 10000.0)
    if local.rope_type != "default":
        raise ValueError(f"rope_type '{local.rope_type}' is not supported for {SLIDING} layers")
    return {"rope": read(overall, theta), "local_rope": local}
