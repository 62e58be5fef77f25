"""The shape of a BERT or RoBERTa, read from Hugging Face's `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft.models.layers import ACTIVATIONS
from jpeft.models.options import check_options

# What transformers takes for options that a file leaves out, where it is not our default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT or RoBERTa, by Hugging Face's names.

    **Attributes:** `problem_type`, the loss that transformers trains a classifier by: not read
    here, and kept in files.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    problem_type: str | None = None
    model_type: str = "bert"

    def __post_init__(self) -> None:
        if self.model_type not in DEFAULTS:
            raise ValueError(
                f"model_type is '{self.model_type}': this is the model of 'bert' and 'roberta'"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act '{self.hidden_act}' is not supported: one of {', '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into "
                f"{self.num_attention_heads} heads"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """From the contents of a `config.json`.

        **Raises:** `ValueError` that names an option that this model does not have.
        """
        only: dict[str, Any] = {
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        }
        names = {f.name for f in dataclasses.fields(cls)}
        check_options(config, {*names, "tie_word_embeddings"}, only)
        merged = {**DEFAULTS.get(config.get("model_type", "bert"), {}), **config}
        return cls(**{k: v for k, v in merged.items() if k in names})

    @property
    def longest(self) -> int:
        """The most tokens it reads; RoBERTa's first positions are the padding's."""
        first = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - first

    @property
    def head_dropout(self) -> float:
        """The dropout before the classifier."""
        return (
            self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
        )
