"""The shape of a T5 or T5 v1.1, read from Hugging Face's `config.json` and written to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft.models.layers import ACTIVATIONS
from jpeft.models.options import check_options

# What the model does where an option could say otherwise.
_ONLY: dict[str, Any] = {"model_type": "t5", "is_encoder_decoder": True, "is_decoder": False}
# A head's, and a length that relative positions do not have.
_UNREAD = {"classifier_dropout", "n_positions"}
# Read by name, beside the fields.
_READ = {"dense_act_fn", "is_gated_act", "scale_decoder_outputs"}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5, by Hugging Face's names.

    T5 has `feed_forward_proj="relu"` and the table of words for its head; v1.1, and what came of it
    (FLAN-T5), has `gated-gelu` and `tie_word_embeddings=False`.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        kind = self.feed_forward_proj.removeprefix("gated-")
        if kind not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj '{self.feed_forward_proj}' is not supported: one of "
                f"{', '.join(ACTIVATIONS)}, with 'gated-' before it or not"
            )
        buckets, far = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or far <= buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets is even, at least 4 and less than twice "
                f"relative_attention_max_distance, got {buckets} and {far}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> T5Config:
        """From the contents of a `config.json`.

        **Raises:** `ValueError` that names an option that this model does not have.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        # Either way round, transformers reads one half of the model otherwise.
        check_options(config, names | _UNREAD | _READ, {**_ONLY, "is_causal": None})
        values: dict[str, Any] = {k: v for k, v in config.items() if k in names}
        # transformers 5 writes that the words are tied always, and here that they are not.
        values["tie_word_embeddings"] = bool(
            config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs", True)
        )
        if values.get("decoder_start_token_id") is None:
            values["decoder_start_token_id"] = values.get("pad_token_id", 0)
        out = cls(**values)
        for name, value in (("dense_act_fn", out.activation), ("is_gated_act", out.gated)):
            if config.get(name, value) not in (value, None):
                raise ValueError(
                    f"{name}={config[name]!r} contradicts feed_forward_proj="
                    f"'{out.feed_forward_proj}', by which it is {value!r}"
                )
        return out

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            **_ONLY,
            "scale_decoder_outputs": self.tie_word_embeddings,
            **dataclasses.asdict(self),
            "num_decoder_layers": self.decoder_layers,
        }

    @property
    def decoder_layers(self) -> int:
        """How many the decoder has: the encoder's number where nothing is said."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a second projection, which its activation scales."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The feed-forward block's."""
        # Hugging Face's one exception: v1.1 was trained with the approximation.
        kind = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else kind
