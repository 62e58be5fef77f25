"""The shape of a GPT-2, read from Hugging Face's `config.json` and written to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jpeft.models.layers import ACTIVATIONS
from jpeft.models.options import check_options

# What the model does where an option could say otherwise.
_ONLY: dict[str, Any] = {
    "model_type": "gpt2",
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_causal": True,
    "tie_word_embeddings": True,
}
# Of heads that this model does not have; `n_ctx` is the old name of what `n_positions` says.
_UNREAD = {
    "n_ctx",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
}


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """The shape of a GPT-2, by Hugging Face's names."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function '{self.activation_function}' is not supported: one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} does not split into {self.n_head} heads")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gpt2Config:
        """From the contents of a `config.json`.

        **Raises:** `ValueError` that names an option that this model does not have.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        check_options(config, names | _UNREAD, _ONLY)
        values: dict[str, Any] = {k: v for k, v in config.items() if k in names}
        if isinstance(values.get("eos_token_id"), list):
            # A list has no hash, and a model's configuration is part of what programs are kept by.
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json`."""
        values = dataclasses.asdict(self)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["GPT2LMHeadModel"], **_ONLY, **values}

    @property
    def width(self) -> int:
        """One head's."""
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """The MLP's."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner
