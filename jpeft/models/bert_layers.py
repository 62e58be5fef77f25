"""BERT's embeddings and one of its layers, and how they are made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from jpeft.models.attention import attention
from jpeft.models.bert_config import BertConfig
from jpeft.models.layers import ACTIVATIONS, dropout
from jpeft.models.norms import LayerNorm

# The first and the last + 1 of some positions.
Places = tuple[int, int] | None


def without_idle(x: Shaped[Array, "b s ..."], idle: Places) -> Shaped[Array, "b t ..."]:
    """The other positions alone; all of them where none is idle."""
    if idle is None:
        return x
    return jnp.concatenate([x[:, : idle[0]], x[:, idle[1] :]], axis=1)


def with_idle(x: Float[Array, "b t d"], idle: Places) -> Float[Array, "b s d"]:
    """Zeros where a prefix stands: what is made of them, its keys and values take the place of."""
    if idle is None:
        return x
    gap = jnp.zeros((x.shape[0], idle[1] - idle[0], x.shape[2]), x.dtype)
    return jnp.concatenate([x[:, : idle[0]], gap, x[:, idle[0] :]], axis=1)


class Parts:
    """How this model makes its layers: one place for types and initial values."""

    def __init__(
        self,
        config: BertConfig,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        attention_rows: int | None = None,
    ) -> None:
        self.config, self.dtype, self.param_dtype, self.rngs = config, dtype, param_dtype, rngs
        self.attention_rows = attention_rows
        self.normal = nnx.initializers.normal(config.initializer_range)

    def linear(self, n_in: int, n_out: int) -> nnx.Linear:
        return nnx.Linear(
            n_in,
            n_out,
            kernel_init=self.normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def norm(self) -> LayerNorm:
        c = self.config
        return LayerNorm(c.hidden_size, c.layer_norm_eps, self.dtype, self.param_dtype)

    def embed(self, rows: int) -> nnx.Embed:
        return nnx.Embed(
            rows,
            self.config.hidden_size,
            embedding_init=self.normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


class Embeddings(nnx.Module):
    """Words, positions and segments, summed and normalised."""

    def __init__(self, parts: Parts) -> None:
        c = parts.config
        self.config = c
        self.word_embeddings = parts.embed(c.vocab_size)
        self.position_embeddings = parts.embed(c.max_position_embeddings)
        self.token_type_embeddings = parts.embed(c.type_vocab_size)
        self.LayerNorm = parts.norm()

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        token_type_ids: Int[Array, "#b #t"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "b t d"]:
        """The first layer's input."""
        c = self.config
        if c.model_type == "roberta":
            # Positions count the tokens that are no padding, from after the padding's own row.
            real = (input_ids != c.pad_token_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + c.pad_token_id
        else:
            positions = jnp.arange(input_ids.shape[1])[None]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(positions))
        return dropout(x, c.hidden_dropout_prob, key)


class SelfAttention(nnx.Module):
    """Query, key and value."""

    def __init__(self, parts: Parts) -> None:
        d = parts.config.hidden_size
        self.query, self.key, self.value = (parts.linear(d, d) for _ in range(3))
        self.dtype = parts.dtype

    def __call__(
        self, asking: Float[Array, "b q d"], x: Float[Array, "b t d"], idle: Places
    ) -> tuple[Float[Array, "b q d"], Float[Array, "b s d"], Float[Array, "b s d"]]:
        """The query of what asks; keys and values of all positions, the `idle` ones too."""
        query = self.query(asking)
        return query, self._seen(self.key, x, idle), self._seen(self.value, x, idle)

    def _seen(self, linear: nnx.Linear, x: Float[Array, "b t d"], idle: Places) -> Array:
        if idle is None:
            return linear(x)
        # Where nothing stands there is nothing to multiply, but the bias is there.
        assert linear.bias is not None
        y = x @ linear.kernel[...].astype(self.dtype)
        return with_idle(y, idle) + linear.bias[...].astype(self.dtype)


class Output(nnx.Module):
    """A projection, dropout, the residual sum and a LayerNorm."""

    def __init__(self, parts: Parts, n_in: int) -> None:
        self.rate = parts.config.hidden_dropout_prob
        self.dense = parts.linear(n_in, parts.config.hidden_size)
        self.LayerNorm = parts.norm()

    def summed(
        self, x: Float[Array, "b t n"], residual: Float[Array, "b t d"], key: PRNGKeyArray | None
    ) -> Float[Array, "b t d"]:
        """`residual + dropout(x W + b)`, before the norm."""
        return residual + dropout(self.dense(x), self.rate, key)


class Attention(nnx.Module):
    """Self-attention and its output."""

    def __init__(self, parts: Parts) -> None:
        self.config, self.rows = parts.config, parts.attention_rows
        self.self = SelfAttention(parts)
        self.output = Output(parts, parts.config.hidden_size)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b s"],
        keys: tuple[PRNGKeyArray | None, ...],
        at: int | None,
        idle: Places,
    ) -> Float[Array, "b q d"]:
        """The attention block's residual sum, before its norm."""
        asking = x if at is None else x[:, at : at + 1]
        mixed = attention(
            *self.self(asking, x, idle),
            keep,
            heads=self.config.num_attention_heads,
            rate=self.config.attention_probs_dropout_prob,
            key=keys[0],
            rows=self.rows,
        )
        return self.output.summed(mixed, asking, keys[1])


class Intermediate(nnx.Module):
    """The MLP's first projection."""

    def __init__(self, parts: Parts) -> None:
        self.act = ACTIVATIONS[parts.config.hidden_act]
        self.dense = parts.linear(parts.config.hidden_size, parts.config.intermediate_size)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """`act(x W + b)`."""
        return self.act(self.dense(x))


def _keys(key: PRNGKeyArray | None) -> tuple[PRNGKeyArray | None, ...]:
    """Those of a layer's three places for dropout."""
    return (None,) * 3 if key is None else tuple(jax.random.split(key, 3))


class Layer(nnx.Module):
    """One transformer layer, normalised after each residual sum: `attended`, `fed`, `closed`."""

    def __init__(self, parts: Parts) -> None:
        self.attention = Attention(parts)
        self.intermediate = Intermediate(parts)
        self.output = Output(parts, parts.config.intermediate_size)

    def attended(
        self,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b s"],
        key: PRNGKeyArray | None,
        at: int | None,
        idle: Places,
    ) -> Float[Array, "b q d"]:
        """The first half, as far as its residual sum: of every position or of the one `at`; see
        `Bert`.
        """
        return self.attention(x, keep, _keys(key)[:2], at, idle)

    def fed(self, summed: Float[Array, "b q d"], key: PRNGKeyArray | None) -> Float[Array, "b q d"]:
        """The second half, from the norm that ends the first to the last residual sum."""
        x = self.attention.output.LayerNorm(summed)
        return self.output.summed(self.intermediate(x), x, _keys(key)[2])

    def closed(self, summed: Float[Array, "b q d"]) -> Float[Array, "b q d"]:
        """The layer's output: the norm of its last sum."""
        return self.output.LayerNorm(summed)
