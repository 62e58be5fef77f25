"""What each family learns from windows of a stream of text, and the models that learn it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

import jpeft
from experiments.common import pretrain_head
from experiments.common.models import machine_layout
from experiments.common.pretrain_head import MaskedBert
from experiments.common.pretrain_masks import masked
from experiments.common.pretrain_sizes import Family, Shape
from experiments.common.pretrain_spans import corrupted, longest_window
from experiments.common.pretrain_tokens import Vocabulary
from experiments.common.scale import axes_of
from jpeft.models.bert import BertConfig
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.t5 import T5, T5Config
from jpeft.paths import flatten, replace
from sharding import Axes, axes_by_pattern

# The last projections of a layer's branches: what the residual stream is given.
_BRANCHES = r"(output/dense|o_proj|down_proj|Attention/o|wo)/kernel$"
# Tokens whose logits a decoder makes at once on a CPU, where more leave its cache.
_CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model and its loss.

    **Attributes:** `model`, the module, whose parameters are not those that are trained; `params`,
    the parameters at the start, fp32; `window`, how many tokens of text make a row;
    `loss(params, windows, key)`, the sum of losses in nats of windows `(b, window)`, and how many
    tokens it is over; `axes`, names of the parameters' axes.
    """

    model: Any
    params: Any
    window: int
    loss: Callable[[Any, Int[Array, "b n"], PRNGKeyArray], Any]
    axes: Axes | None


def objective(
    family: Family, shape: Shape, vocabulary: Vocabulary, length: int, dtype: Any, seed: int
) -> Objective:
    """A family's model of a shape, at its start.

    Rows of `length` tokens begin with [CLS]; the encoders' end with [SEP].

    **Arguments:** `dtype`, what the model computes in.

    **Raises:** `ValueError` for a length that has no room for what is foretold.
    """
    if length < 8:
        raise ValueError(f"--length {length}: a row has at least 8 tokens")
    made = {"encoder": _encoder, "decoder": _decoder, "encoder_decoder": _encoder_decoder}
    return made[family](shape, vocabulary, length, dtype, nnx.Rngs(seed))


def _encoder(shape: Shape, v: Vocabulary, length: int, dtype: Any, rngs: nnx.Rngs) -> Objective:
    config = BertConfig(
        vocab_size=v.size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=length,
        initializer_range=_deviation(shape),
        pad_token_id=v.pad,
        # There is none in pre-training, and small models are not to have any in fine-tuning.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = MaskedBert(config, rngs=rngs, dtype=dtype, **machine_layout())
    apply, params = jpeft.functional(model)

    def loss(params: Any, windows: Any, key: Any) -> Any:
        made = masked(_framed(windows, v, end=True), v, key)
        return apply(params, made.ids, made.positions, made.labels)

    axes = axes_by_pattern(pretrain_head.AXES)
    return Objective(model, _scaled(params, shape.layers), length - 2, loss, axes)


def _decoder(shape: Shape, v: Vocabulary, length: int, dtype: Any, rngs: nnx.Rngs) -> Objective:
    config = LlamaConfig(
        vocab_size=v.size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=length,
        initializer_range=_deviation(shape),
        tie_word_embeddings=True,
        pad_token_id=v.pad,
        bos_token_id=v.first,
        eos_token_id=v.end,
    )
    model = Llama(config, rngs=rngs, dtype=dtype, **machine_layout(encoder=False))
    apply, params = jpeft.functional(model)

    def loss(params: Any, windows: Any, key: Any) -> Any:
        del key
        ids = _framed(windows, v, end=False)
        on_cpu = jax.default_backend() == "cpu"
        return apply(params, ids, labels=ids, chunk=_CHUNK if on_cpu else ids.size)

    return Objective(model, _scaled(params, shape.layers), length - 1, loss, axes_of(model))


def _encoder_decoder(
    shape: Shape, v: Vocabulary, length: int, dtype: Any, rngs: nnx.Rngs
) -> Objective:
    spans = longest_window(length - 2)
    config = T5Config(
        vocab_size=v.size,
        d_model=shape.width,
        d_kv=shape.width // shape.heads,
        d_ff=shape.inner,
        num_layers=shape.layers,
        num_decoder_layers=shape.decoder_layers,
        num_heads=shape.heads,
        pad_token_id=v.pad,
        eos_token_id=v.end,
        decoder_start_token_id=v.pad,
    )
    model = T5(config, rngs=rngs, dtype=dtype, **machine_layout(encoder=False))
    apply, params = jpeft.functional(model)
    # T5's words start at a deviation of 1, for an optimiser whose steps grow with what they move.
    # For Adam they start as the other families', and the last norm undoes the head's scaling.
    params["shared"]["embedding"] *= _deviation(shape)
    params["decoder"]["final_layer_norm"]["scale"] *= shape.width**0.5

    def loss(params: Any, windows: Any, key: Any) -> Any:
        made = corrupted(windows, spans, v, key)
        ids = _framed(made.inputs, v, end=True)
        return apply(params, ids, labels=made.targets, chunk=made.targets.size)

    deep = max(shape.layers, shape.decoder_layers)
    return Objective(model, _scaled(params, deep), spans.window, loss, axes_of(model))


def _framed(windows: Int[Array, "b n"], v: Vocabulary, end: bool) -> Int[Array, "b t"]:
    """[CLS] before every row, and [SEP] after it."""
    first, last = (jnp.full((windows.shape[0], 1), t, windows.dtype) for t in (v.first, v.end))
    return jnp.concatenate([first, windows, last] if end else [first, windows], axis=1)


def _deviation(shape: Shape) -> float:
    """Of initial values: BERT's at its width, and such that products are as large at others."""
    return 0.02 * (768 / shape.width) ** 0.5


def _scaled(params: Any, layers: int) -> Any:
    """Branches scaled down, so that the residual stream starts as wide in deep models as in others
    (Radford et al. 2019, section 2.3).
    """
    found = {p: x for p, x in flatten(params).items() if re.search(_BRANCHES, p)}
    return replace(params, {p: x * (2 * layers) ** -0.5 for p, x in found.items()})
