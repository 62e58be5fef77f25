"""GPT-2, a causal language model.

Radford et al. 2019. The layers are stacked along axis 0 of their parameters and scanned. Names in
paths are Hugging Face's, `transformer/h/attn/c_attn/kernel`; the table of words is the output
head too.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jpeft.models import cache as caches
from jpeft.models.cache import Cache, positions_of
from jpeft.models.causal import Implementation, causal_attention, may_read
from jpeft.models.gpt2_config import Gpt2Config as Gpt2Config
from jpeft.models.layers import (
    ACTIVATIONS,
    Remat,
    dropout,
    last_tokens,
    rematerialised,
    wide_dot_general,
)
from jpeft.models.loss import next_token_loss
from jpeft.models.norms import LayerNorm

# The logical axes of every parameter, by a pattern of its path. The heads of `c_attn` are those of
# query, key and value, one after the other.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"wte/embedding$", ("vocab", "embed")),
    (r"wpe/embedding$", ("positions", "embed")),
    (r"attn/c_attn/kernel$", ("layers", "embed", "heads")),
    (r"attn/c_attn/bias$", ("layers", "heads")),
    (r"attn/c_proj/kernel$", ("layers", "heads", "embed")),
    (r"mlp/c_fc/kernel$", ("layers", "embed", "mlp")),
    (r"mlp/c_fc/bias$", ("layers", "mlp")),
    (r"mlp/c_proj/kernel$", ("layers", "mlp", "embed")),
    (r"c_proj/bias$", ("layers", "embed")),
    (r"ln_[12]/(scale|bias)$", ("layers", "embed")),
    (r"ln_f/(scale|bias)$", ("embed",)),
)

# All layers' keys and values, or None; the layer's number; the slot that is written.
Kept = tuple[Any, Any, Any]


class _Parts:
    """How this model makes its layers: one place for types and initial values."""

    def __init__(
        self,
        config: Gpt2Config,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
        implementation: Implementation = None,
    ) -> None:
        self.config, self.dtype, self.param_dtype, self.rngs = config, dtype, param_dtype, rngs
        self.implementation: Implementation = implementation

    def linear(self, n_in: int, n_out: int, *, residual: bool = False) -> nnx.Linear:
        # 2 n_layer projections add to the residual stream: section 2.3 of the paper.
        shrink = math.sqrt(2 * self.config.n_layer) if residual else 1.0
        return nnx.Linear(
            n_in,
            n_out,
            kernel_init=nnx.initializers.normal(self.config.initializer_range / shrink),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def norm(self) -> LayerNorm:
        c = self.config
        return LayerNorm(c.n_embd, c.layer_norm_epsilon, self.dtype, self.param_dtype)

    def embed(self, rows: int) -> nnx.Embed:
        return nnx.Embed(
            rows,
            self.config.n_embd,
            embedding_init=nnx.initializers.normal(self.config.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


class Attention(nnx.Module):
    """Causal self-attention; one kernel makes query, key and value."""

    def __init__(self, parts: _Parts) -> None:
        d = parts.config.n_embd
        self.config = parts.config
        self.implementation: Implementation = parts.implementation
        self.c_attn = parts.linear(d, 3 * d)
        self.c_proj = parts.linear(d, d, residual=True)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b t s"] | None,
        kept: Kept,
        keys: tuple[PRNGKeyArray | None, ...],
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The attention's output, and the stores with the layer's new keys and values."""
        c = self.config
        query, key, value = (
            part.reshape(*x.shape[:2], c.n_head, c.width)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        stores, key, value = caches.remember(*kept, key, value)
        mixed = causal_attention(
            query,
            key,
            value,
            keep,
            scale=c.width**-0.5 if c.scale_attn_weights else 1.0,
            rate=c.attn_pdrop,
            rng=keys[0],
            implementation=self.implementation,
        )
        return dropout(self.c_proj(mixed.reshape(x.shape)), c.resid_pdrop, keys[1]), stores


class Mlp(nnx.Module):
    """The feed-forward block."""

    def __init__(self, parts: _Parts) -> None:
        c = parts.config
        self.rate, self.act = c.resid_pdrop, ACTIVATIONS[c.activation_function]
        self.c_fc = parts.linear(c.n_embd, c.inner)
        self.c_proj = parts.linear(c.inner, c.n_embd, residual=True)

    def __call__(self, x: Float[Array, "b t d"], key: PRNGKeyArray | None) -> Float[Array, "b t d"]:
        """`dropout(act(x W + b) W' + b')`."""
        return dropout(self.c_proj(self.act(self.c_fc(x))), self.rate, key)


class Block(nnx.Module):
    """One transformer layer, normalised before each of its two parts."""

    def __init__(self, parts: _Parts) -> None:
        self.ln_1, self.attn = parts.norm(), Attention(parts)
        self.ln_2, self.mlp = parts.norm(), Mlp(parts)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Bool[Array, "b t s"] | None,
        kept: Kept,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The layer's output, and the stores."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        mixed, stores = self.attn(self.ln_1(x), keep, kept, keys[:2])
        x = x + mixed
        return x + self.mlp(self.ln_2(x), keys[2]), stores


class Transformer(nnx.Module):
    """The model without its head; every parameter of `h` has the layers along axis 0."""

    def __init__(self, parts: _Parts, *, remat: Remat, unroll: int) -> None:
        c = parts.config
        self.config, self.remat, self.unroll = c, remat, unroll
        self.wte, self.wpe = parts.embed(c.vocab_size), parts.embed(c.n_positions)

        @nnx.split_rngs(splits=c.n_layer)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(_Parts(c, parts.dtype, parts.param_dtype, rngs, parts.implementation))

        self.h = stacked(parts.rngs)
        self.ln_f = parts.norm()

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        keep: Bool[Array, "b t s"] | None,
        cache: Cache | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The last hidden state, normalised, and all layers' keys and values."""
        first, rest = (None, None) if key is None else jax.random.split(key)
        # Padding has position -1, and nobody reads what stands there.
        x = self.wte(input_ids) + self.wpe(jnp.maximum(positions, 0))
        x = dropout(x, self.config.embd_pdrop, first)
        graphdef, state = nnx.split(self.h)
        keys = None if rest is None else jax.random.split(rest, self.config.n_layer)
        stores = None if cache is None else (cache.keys, cache.values)
        slot = None if cache is None else cache.length

        def step(carry: tuple[Array, Any], layer: tuple[Any, Any, Any]) -> tuple[Any, None]:
            x, stores = carry
            state, number, key = layer
            return nnx.merge(graphdef, state)(x, keep, (stores, number, slot), key), None

        body = rematerialised(step, self.remat)
        layers = (state, jnp.arange(self.config.n_layer), keys)
        (x, stores), _ = jax.lax.scan(body, (x, stores), layers, unroll=self.unroll)
        return self.ln_f(x), stores


class Gpt2(nnx.Module):
    """GPT-2 with its head.

    **Arguments:** `config`; `dtype`, what it computes in; `param_dtype`, what its parameters are;
    `remat`, forget each layer's activations and compute them again in the backward pass, or a
    policy of `jax.checkpoint_policies` for what to keep; `unroll`, layers per step of the scan;
    `implementation`, of attention, as `causal_attention`'s.
    """

    def __init__(
        self,
        config: Gpt2Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = False,
        unroll: int = 1,
        implementation: Implementation = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        parts = _Parts(config, dtype, param_dtype, rngs, implementation)
        self.transformer = Transformer(parts, remat=remat, unroll=unroll)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"] | None = None,
        *,
        position_ids: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        hidden: bool = False,
        last: bool = False,
        labels: Int[Array, "b t"] | None = None,
        chunk: int = 1024,
    ) -> Any:
        """The logits `(b, t, v)`, fp32; with a cache, `(logits, cache)`.

        **Arguments:**

        - `attention_mask`, 1 at tokens and 0 at padding, on either side; all ones when left out,
          which lets cuDNN's attention leave out the half that nobody reads.
        - `position_ids`, each token's position; left out, they count the tokens that are no
          padding, after those in the cache.
        - `segment_ids`, of rows with several texts in them: tokens read their own text alone, and
          positions start again with it.
        - `cache`, what was read before: the tokens continue it.
        - `key` switches dropout on.
        - `hidden`, give the last hidden state `(b, t, d)`, which `head` reads, for the logits.
        - `last`, give the logits of each row's last token alone, `(b, 1, v)`.
        - `labels`, give the sum of the losses of next tokens and their count instead, the logits
          made for `chunk` tokens at a time: `next_token_loss`.

        **Raises:** `ValueError` for an input longer than the table of positions or than the
        cache's room, or for segments with a cache.
        """
        limit, t = self.config.n_positions, input_ids.shape[1]
        if position_ids is None and t > limit:
            raise ValueError(f"the input has {t} tokens, the model reads {limit}")
        given = (attention_mask, position_ids, segment_ids, cache)
        whole = all(x is None for x in given)
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        positions = positions_of(
            attention_mask, position_ids=position_ids, segment_ids=segment_ids, cache=cache
        )
        known = positions
        if cache is not None:
            known = caches.write(cache.positions, positions, cache.length)
        keep = None
        if not whole:
            keep = may_read(positions, known, query_segments=segment_ids, key_segments=segment_ids)
        x, stores = self.transformer(input_ids, positions, keep, cache, key)
        if labels is not None:
            return next_token_loss(x, self.head, labels, chunk=chunk)
        x = last_tokens(x, attention_mask) if last else x
        out = x if hidden else self.head(x)
        if cache is None:
            return out
        return out, Cache(stores[0], stores[1], known, cache.length + t)

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """The logits, fp32, of last hidden states: products with the table of words."""
        table = self.transformer.wte.embedding[...].astype(self.dtype)
        return wide_dot_general(hidden, table, (((2,), (1,)), ((), ())))

    def empty_cache(self, batch: int, room: int, dtype: Any = None) -> Cache:
        """A cache for `batch` rows of up to `room` tokens, padding among them.

        **Raises:** `ValueError` for more room than there are positions.
        """
        c = self.config
        if room > c.n_positions:
            raise ValueError(f"room for {room} tokens, the model reads {c.n_positions}")
        dtype = self.dtype if dtype is None else dtype
        return caches.empty_cache(c.n_layer, batch, room, c.n_head, c.width, dtype)
