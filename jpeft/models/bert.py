"""BERT and RoBERTa, with a head for classification or regression.

Devlin et al. 2019; Liu et al. 2019. The layers are stacked along axis 0 of their parameters and
scanned. Names in paths are Hugging Face's.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jpeft.models.bert_config import BertConfig as BertConfig
from jpeft.models.bert_layers import Embeddings, Layer, Parts, Places, without_idle
from jpeft.models.layers import Remat, dropout, rematerialised

Pooling = Literal["cls", "mean"]
# The logical axes of every parameter, by a pattern of its path.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"word_embeddings/embedding$", ("vocab", "embed")),
    (r"position_embeddings/embedding$", ("positions", "embed")),
    (r"token_type_embeddings/embedding$", ("types", "embed")),
    (r"embeddings/LayerNorm/(scale|bias)$", ("embed",)),
    (r"attention/self/(query|key|value)/kernel$", ("layers", "embed", "heads")),
    (r"attention/self/(query|key|value)/bias$", ("layers", "heads")),
    (r"attention/output/dense/kernel$", ("layers", "heads", "embed")),
    (r"intermediate/dense/kernel$", ("layers", "embed", "mlp")),
    (r"intermediate/dense/bias$", ("layers", "mlp")),
    (r"layer/output/dense/kernel$", ("layers", "mlp", "embed")),
    (r"output/dense/bias$", ("layers", "embed")),
    (r"output/LayerNorm/(scale|bias)$", ("layers", "embed")),
    (r"(pooler|classifier)/dense/kernel$", ("embed", "embed_out")),
    (r"(pooler|classifier)/dense/bias$", ("embed_out",)),
    (r"classifier(/out_proj)?/kernel$", ("embed", "labels")),
    (r"classifier(/out_proj)?/bias$", ("labels",)),
)


class Encoder(nnx.Module):
    """The layers, stacked along axis 0 of every parameter of `layer`."""

    def __init__(self, parts: Parts, *, remat: Remat, unroll: int) -> None:
        self.remat, self.unroll, self.layers = remat, unroll, parts.config.num_hidden_layers

        @nnx.split_rngs(splits=self.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(
                Parts(parts.config, parts.dtype, parts.param_dtype, rngs, parts.attention_rows)
            )

        self.layer = stacked(parts.rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b s"],
        key: PRNGKeyArray | None,
        at: int | None = None,
        idle: Places = None,
    ) -> Float[Array, "b q d"]:
        """The last layer's output, of every position or of the one `at`; see `Bert`."""
        graphdef, state = nnx.split(self.layer)
        keys = None if key is None else jax.random.split(key, self.layers)

        def layer(i: Any) -> tuple[Any, Any]:
            index = jax.lax.index_in_dim if isinstance(i, int) else jax.lax.dynamic_index_in_dim
            return jax.tree.map(lambda a: index(a, i, keepdims=False), (state, keys))

        # Straight-line, a layer begins with the norm that ends the one before, and is two halves,
        # each from a norm to a sum. Of what is between them the sums alone are kept, and the second
        # half's part of the backward pass is over when the first half is made again for its own.
        def attended(x: Array, before: Any, own: tuple[Any, Any], at: int | None) -> Array:
            x = x if before is None else nnx.merge(graphdef, before).closed(x)
            return nnx.merge(graphdef, own[0]).attended(x, keep, own[1], at, idle)

        def fed(x: Array, own: tuple[Any, Any]) -> Array:
            return nnx.merge(graphdef, own[0]).fed(x, own[1])

        def step(x: Array, own: tuple[Any, Any], at: int | None = None) -> Array:
            return nnx.merge(graphdef, own[0]).closed(fed(attended(x, None, own, at), own))

        n = self.layers - 1
        if self.unroll >= (self.layers if at is None else n):
            before = None
            for i in range(self.layers):
                own, here = layer(i), at if i == n else None
                first = rematerialised(functools.partial(attended, at=here), self.remat)
                x = rematerialised(fed, self.remat)(first(x, before, own), own)
                before = own[0]
            return nnx.merge(graphdef, before).closed(x)
        if at is None:
            body = rematerialised(lambda x, own: (step(x, own), None), self.remat)
            return jax.lax.scan(body, x, (state, keys), unroll=self.unroll)[0]
        # The last layer is by itself, where it is for one position. A loop finds its layers in the
        # whole stack: of all but the last there would have to be a copy.
        body = rematerialised(lambda x, i: (step(x, layer(i)), None), self.remat)
        x, _ = jax.lax.scan(body, x, jnp.arange(n), unroll=self.unroll)
        return rematerialised(functools.partial(step, at=at), self.remat)(x, layer(n))


class Pooler(nnx.Module):
    """BERT's `tanh(h W + b)` of the first token."""

    def __init__(self, parts: Parts) -> None:
        self.dense = parts.linear(parts.config.hidden_size, parts.config.hidden_size)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The pooled state."""
        return jnp.tanh(self.dense(x))


class Bert(nnx.Module):
    """The encoder without a head.

    **Arguments:** `config`; `dtype`, what it computes in; `param_dtype`, what its parameters are;
    `remat`, forget each layer's activations and compute them again in the backward pass, or a
    policy of `jax.checkpoint_policies` for what to keep; `unroll`, layers per step of the scan;
    `attention_rows`, see `attention`; `pooler`, whether it has BERT's.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = False,
        unroll: int = 1,
        attention_rows: int | None = None,
        pooler: bool = True,
    ) -> None:
        parts = Parts(config, dtype, param_dtype, rngs, attention_rows)
        self.config = config
        self.embeddings = Embeddings(parts)
        self.encoder = Encoder(parts, remat=remat, unroll=unroll)
        if pooler:
            self.pooler = Pooler(parts)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        at: int | None = None,
        idle: Places = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b q d"]:
        """The last hidden state, of every position.

        **Arguments:**

        - `attention_mask`: 1 at tokens and 0 at padding; all ones when left out.
        - `at`: the one position that is wanted. `q` is 1 then: the last layer works on no other.
        - `idle`: the first and the last + 1 of positions that have keys and values alone, those of
          a `jpeft.PrefixTuning`, whose hidden states nobody reads: they are not worked out, and the
          result, and `at`, know only of the others.
        - `key`: switches dropout on.

        **Raises:** `ValueError` for an input longer than the table of positions, and for an `at` or
        an `idle` that is not within the input.
        """
        limit = self.config.longest
        if input_ids.shape[1] > limit:
            raise ValueError(f"the input has {input_ids.shape[1]} tokens, the model reads {limit}")
        start, stop = idle or (0, 0)
        if not 0 <= start <= stop <= input_ids.shape[1]:
            raise ValueError(f"idle={idle}: the input has positions 0 to {input_ids.shape[1]}")
        if at is not None and not 0 <= at < input_ids.shape[1] - (stop - start):
            raise ValueError(f"at={at}: there are {input_ids.shape[1] - (stop - start)} positions")
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if token_type_ids is None:
            # Looked up once: the gradients of all tokens would be added to one row, one by one.
            token_type_ids = jnp.zeros((1, 1), input_ids.dtype)
        first, rest = (None, None) if key is None else jax.random.split(key)
        x = without_idle(self.embeddings(input_ids, token_type_ids, first), idle)
        return self.encoder(x, attention_mask.astype(bool), rest, at, idle)


class RobertaHead(nnx.Module):
    """RoBERTa's two-layer head."""

    def __init__(self, parts: Parts, n_out: int) -> None:
        self.rate = parts.config.head_dropout
        self.dense = parts.linear(parts.config.hidden_size, parts.config.hidden_size)
        self.out_proj = parts.linear(parts.config.hidden_size, n_out)

    def __call__(self, x: Float[Array, "b d"], key: PRNGKeyArray | None) -> Float[Array, "b c"]:
        """The logits."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        x = jnp.tanh(self.dense(dropout(x, self.rate, keys[0])))
        return self.out_proj(dropout(x, self.rate, keys[1]))


class BertForSequenceClassification(nnx.Module):
    """The encoder with a head; `num_labels=1` is regression.

    **Arguments:** as `Bert`'s, and `pooling`: `cls`, Hugging Face's (the first token, through
    BERT's pooler), or `mean`, the mean over tokens that are no padding straight into the
    classifier, which suits encoders trained as sentence embedders.
    """

    def __init__(
        self,
        config: BertConfig,
        num_labels: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = False,
        unroll: int = 1,
        attention_rows: int | None = None,
        pooling: Pooling = "cls",
    ) -> None:
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling is 'cls' or 'mean', got '{pooling}'")
        self.config, self.num_labels, self.pooling, self.dtype = config, num_labels, pooling, dtype
        roberta = config.model_type == "roberta"
        encoder = Bert(
            config,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
            unroll=unroll,
            attention_rows=attention_rows,
            pooler=pooling == "cls" and not roberta,
        )
        setattr(self, config.model_type, encoder)
        # The head is small, and its output is the loss's input: it computes in fp32.
        parts = Parts(config, jnp.float32, param_dtype, rngs)
        if roberta:
            self.classifier = RobertaHead(parts, num_labels)
        else:
            self.classifier = parts.linear(config.hidden_size, num_labels)

    @property
    def encoder(self) -> Bert:
        """The model without its head."""
        return getattr(self, self.config.model_type)

    def features(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        pooling_mask: Int[Array, "b t"] | None = None,
        idle: Places = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b d"]:
        """What the classifier reads, before its dropout, in fp32.

        **Arguments:** `pooling_mask`, the positions that mean pooling averages, where they are not
        those of `attention_mask`; `idle`, see `Bert`: the first token is the first of the others.
        """
        at = 0 if self.pooling == "cls" else None
        inputs = (input_ids, attention_mask, token_type_ids)
        hidden = self.encoder(*inputs, at=at, idle=idle, key=key)
        if self.pooling == "cls":
            first = hidden[:, 0]
            pooled = self.encoder.pooler(first) if self.config.model_type == "bert" else first
            return pooled.astype(jnp.float32)
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        kept = without_idle(attention_mask if pooling_mask is None else pooling_mask, idle)
        weight = kept.astype(jnp.float32)[..., None]
        total = jnp.sum(hidden.astype(jnp.float32) * weight, axis=1)
        return total / jnp.maximum(jnp.sum(weight, axis=1), 1)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        token_type_ids: Int[Array, "b t"] | None = None,
        *,
        pooling_mask: Int[Array, "b t"] | None = None,
        idle: Places = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b c"]:
        """The logits (fp32), or the prediction of a regression; `key` switches dropout on."""
        first, rest = (None, None) if key is None else jax.random.split(key)
        inputs = (input_ids, attention_mask, token_type_ids)
        x = self.features(*inputs, pooling_mask=pooling_mask, idle=idle, key=first)
        if isinstance(self.classifier, RobertaHead):
            return self.classifier(x, rest)
        return self.classifier(dropout(x, self.config.head_dropout, rest))
