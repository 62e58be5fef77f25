"""BERT with its head for masked tokens, under Hugging Face's names."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpeft.hf.files import write
from jpeft.hf.names import Family
from jpeft.hf.params import lazy_tensors
from jpeft.models import bert
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.layers import ACTIVATIONS
from jpeft.models.loss import next_token_loss
from jpeft.models.norms import LayerNorm
from jpeft.paths import flatten

AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"predictions/transform/dense/kernel$", ("embed", "embed_out")),
    (r"predictions/transform/.*/(scale|bias)$", ("embed",)),
    (r"predictions/bias$", ("vocab",)),
    *bert.AXES,
)
FAMILY = Family(stacks=("bert/encoder/layer",), prefix="bert.")


class Transform(nnx.Module):
    """A projection, the activation and a LayerNorm."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        d = config.hidden_size
        self.act = ACTIVATIONS[config.hidden_act]
        self.dense = nnx.Linear(
            d,
            d,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.LayerNorm = LayerNorm(d, config.layer_norm_eps, dtype, param_dtype)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """`LayerNorm(act(x W + b))`."""
        return self.LayerNorm(self.act(self.dense(x)))


class Predictions(nnx.Module):
    """The transform, and the bias of a decoder that is the table of words."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        self.transform = Transform(config, rngs, dtype, param_dtype)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), param_dtype))


class Heads(nnx.Module):
    """What Hugging Face's files have under `cls`."""

    def __init__(self, predictions: Predictions) -> None:
        self.predictions = predictions


class MaskedBert(nnx.Module):
    """BERT that foretells masked tokens.

    **Arguments:** as `Bert`'s, which has no pooler here.

    Source: Devlin et al. 2019, section 3.1 and appendix A.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        **layout: Any,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.bert = Bert(
            config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, pooler=False, **layout
        )
        self.cls = Heads(Predictions(config, rngs, dtype, param_dtype))

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b n"] | None = None,
        labels: Int[Array, "b n"] | None = None,
    ) -> Any:
        """The logits, fp32 `(b, n, v)`, at some positions of every row, or at all.

        **Arguments:** `labels`, give the sum of the losses there and their count instead; -100
        where there is none.
        """
        x = self.bert(input_ids)
        if positions is not None:
            x = jnp.take_along_axis(x, positions[..., None], axis=1)
        x = self.cls.predictions.transform(x)
        if labels is None:
            return self.head(x)
        return next_token_loss(x, self.head, labels, chunk=labels.size, shift=False)

    def head(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """The logits, fp32, of transformed states."""
        table = self.bert.embeddings.word_embeddings.embedding[...].astype(self.dtype)
        logits = jnp.einsum("bnd,vd->bnv", hidden, table, preferred_element_type=jnp.float32)
        return logits + self.cls.predictions.bias[...].astype(jnp.float32)


def save_masked_bert(model: MaskedBert, directory: pathlib.Path, params: Any) -> None:
    """A directory that transformers loads as `BertForMaskedLM`, and the encoder's readers too.

    **Raises:** `OSError` when it cannot be written, and then nothing is.
    """
    config = {
        **dataclasses.asdict(model.config),
        "architectures": ["BertForMaskedLM"],
        "dtype": str(next(iter(flatten(params).values())).dtype),
    }
    write(directory, config, lazy_tensors(params, FAMILY))
