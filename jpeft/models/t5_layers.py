"""T5's layers, and how they are made."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft.models import cache as caches
from jpeft.models.causal import causal_attention
from jpeft.models.layers import ACTIVATIONS, dropout, gated
from jpeft.models.norms import RMSNorm
from jpeft.models.t5_config import T5Config

# All layers' keys and values, or None; the layer's number; the slot that is written.
Kept = tuple[Any, Any, Any]
NOTHING: Kept = (None, None, None)


class Parts:
    """How this model makes its layers: one place for types and initial values."""

    def __init__(self, config: T5Config, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.config, self.dtype, self.param_dtype, self.rngs = config, dtype, param_dtype, rngs

    def linear(self, n_in: int, n_out: int, std: float) -> nnx.Linear:
        return nnx.Linear(
            n_in,
            n_out,
            use_bias=False,
            kernel_init=nnx.initializers.normal(self.config.initializer_factor * std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def norm(self) -> RMSNorm:
        c = self.config
        return RMSNorm(c.d_model, c.layer_norm_epsilon, self.dtype, self.param_dtype)

    def embed(self, rows: int, width: int, std: float) -> nnx.Embed:
        return nnx.Embed(
            rows,
            width,
            embedding_init=nnx.initializers.normal(self.config.initializer_factor * std),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


def buckets(
    distance: Int[Array, "*shape"], *, both_ways: bool, count: int, far: int
) -> Int[Array, "*shape"]:
    """The bucket of each distance, key position minus query position.

    The nearest half of the buckets hold one distance each, the others grow with its logarithm up
    to `far`. With `both_ways` each direction has half of the buckets; without it distances ahead,
    which nobody reads, are in the first.

    Source: Raffel et al. 2020, section 2.1; the growth is that of their code.
    """
    if both_ways:
        count //= 2
    single = count // 2
    # A table, because the logarithms of some distances are on an edge between two buckets, where
    # each backend's rounding would decide: here it is NumPy's, in fp32 as in training.
    steps = np.arange(far + 1, dtype=np.float32)
    growth = np.log(np.maximum(steps, 1) / np.float32(single)) / np.float32(math.log(far / single))
    large = single + (growth * np.float32(count - single)).astype(np.int32)
    table = np.where(steps < single, steps.astype(np.int32), np.minimum(large, count - 1))
    back = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    found = jnp.asarray(table, jnp.int32)[jnp.minimum(back, far)]
    return found + count * (distance > 0) if both_ways else found


class Attention(nnx.Module):
    """Attention whose scores are not scaled: the initial values of `q` are."""

    def __init__(self, parts: Parts) -> None:
        c = parts.config
        self.config, inner = c, c.num_heads * c.d_kv
        self.q = parts.linear(c.d_model, inner, (c.d_model * c.d_kv) ** -0.5)
        self.k = parts.linear(c.d_model, inner, c.d_model**-0.5)
        self.v = parts.linear(c.d_model, inner, c.d_model**-0.5)
        self.o = parts.linear(inner, c.d_model, inner**-0.5)

    def _heads(self, x: Float[Array, "b t n"]) -> Float[Array, "b t h w"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.d_kv)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        source: Float[Array, "b s d"],
        keep: Any,
        bias: Any,
        key: PRNGKeyArray | None,
        kept: Kept = NOTHING,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """What `x` reads of `source`, and the stores with the latter's keys and values.

        **Arguments:** `keep`, which broadcasts to `(b, t, s)`; `bias`, or None, `(#b, h, t, s)`.
        """
        query, keys, values = self._heads(self.q(x)), self.k(source), self.v(source)
        keys, values = self._heads(keys), self._heads(values)
        stores, keys, values = caches.remember(*kept, keys, values)
        mixed = causal_attention(
            query,
            keys,
            values,
            keep,
            scale=1.0,
            bias=bias,
            rate=self.config.dropout_rate,
            rng=key,
        )
        return self.o(mixed.reshape(*x.shape[:2], -1)), stores


class LayerSelfAttention(nnx.Module):
    """A norm and self-attention."""

    def __init__(self, parts: Parts) -> None:
        self.SelfAttention, self.layer_norm = Attention(parts), parts.norm()


class LayerCrossAttention(nnx.Module):
    """A norm and attention to the encoder's output."""

    def __init__(self, parts: Parts) -> None:
        self.EncDecAttention, self.layer_norm = Attention(parts), parts.norm()


class FeedForward(nnx.Module):
    """`dropout(act(x W)) W'`, or gated, `dropout(act(x W0) * (x W1)) W'`."""

    def __init__(self, parts: Parts) -> None:
        c = parts.config
        self.config, self.act = c, ACTIVATIONS[c.activation]
        self.gated = gated(c.activation)
        if c.gated:
            self.wi_0 = parts.linear(c.d_model, c.d_ff, c.d_model**-0.5)
            self.wi_1 = parts.linear(c.d_model, c.d_ff, c.d_model**-0.5)
        else:
            self.wi = parts.linear(c.d_model, c.d_ff, c.d_model**-0.5)
        self.wo = parts.linear(c.d_ff, c.d_model, c.d_ff**-0.5)

    def __call__(self, x: Float[Array, "b t d"], key: PRNGKeyArray | None) -> Float[Array, "b t d"]:
        """The block's output."""
        if self.config.gated:
            inner = self.gated(self.wi_0(x), self.wi_1(x))
        else:
            inner = self.act(self.wi(x))
        return self.wo(dropout(inner, self.config.dropout_rate, key))


class LayerFF(nnx.Module):
    """A norm and the feed-forward block."""

    def __init__(self, parts: Parts) -> None:
        self.DenseReluDense, self.layer_norm = FeedForward(parts), parts.norm()


class Block(nnx.Module):
    """One layer: self-attention, in a decoder attention to the encoder, feed-forward."""

    def __init__(self, parts: Parts, decoder: bool) -> None:
        self.rate = parts.config.dropout_rate
        cross = [LayerCrossAttention(parts)] if decoder else []
        self.layer = nnx.List([LayerSelfAttention(parts), *cross, LayerFF(parts)])

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Any,
        bias: Any,
        encoded: Float[Array, "b s d"] | None,
        encoded_keep: Any,
        kept: Kept,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The layer's output, and the stores."""
        keys = (None,) * 6 if key is None else tuple(jax.random.split(key, 6))
        layer: Any = self.layer
        own, last = layer[0], layer[-1]
        h = own.layer_norm(x)
        mixed, stores = own.SelfAttention(h, h, keep, bias, keys[0], kept)
        x = x + dropout(mixed, self.rate, keys[1])
        if encoded is not None:
            cross = layer[1]
            h = cross.layer_norm(x)
            mixed, _ = cross.EncDecAttention(h, encoded, encoded_keep, None, keys[2])
            x = x + dropout(mixed, self.rate, keys[3])
        return x + dropout(
            last.DenseReluDense(last.layer_norm(x), keys[4]), self.rate, keys[5]
        ), stores
