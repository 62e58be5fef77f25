"""T5 and T5 v1.1: encoder and decoder with biases for relative positions.

Raffel et al. 2020; v1.1's gated feed-forward block is Shazeer 2020. The layers are stacked along
axis 0 of their parameters and scanned. Names in paths are Hugging Face's,
`decoder/block/layer/1/EncDecAttention/q/kernel`, except that the relative positions' table, which
all layers of a stack share, is the stack's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft.models import cache as caches
from jpeft.models.cache import Cache, positions_of
from jpeft.models.causal import may_read
from jpeft.models.layers import Remat, dropout, last_tokens, rematerialised, wide_dot_general
from jpeft.models.loss import next_token_loss
from jpeft.models.t5_config import T5Config as T5Config
from jpeft.models.t5_layers import Block, Parts, buckets

# The logical axes of every parameter, by a pattern of its path.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^shared/embedding$", ("vocab", "embed")),
    (r"^lm_head/kernel$", ("embed", "vocab")),
    (r"relative_attention_bias/embedding$", ("buckets", "heads")),
    (r"Attention/[qkv]/kernel$", ("layers", "embed", "heads")),
    (r"Attention/o/kernel$", ("layers", "heads", "embed")),
    (r"DenseReluDense/wi(_[01])?/kernel$", ("layers", "embed", "mlp")),
    (r"DenseReluDense/wo/kernel$", ("layers", "mlp", "embed")),
    (r"/layer_norm/scale$", ("layers", "embed")),
    (r"/final_layer_norm/scale$", ("embed",)),
)


class Stack(nnx.Module):
    """Encoder or decoder; every parameter of `block` has the layers along axis 0."""

    def __init__(self, parts: Parts, *, decoder: bool, remat: Remat, unroll: int) -> None:
        c = parts.config
        self.config, self.decoder, self.remat, self.unroll = c, decoder, remat, unroll
        self.layers = c.decoder_layers if decoder else c.num_layers
        self.relative_attention_bias = parts.embed(
            c.relative_attention_num_buckets, c.num_heads, c.d_model**-0.5
        )

        @nnx.split_rngs(splits=self.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(Parts(c, parts.dtype, parts.param_dtype, rngs), decoder)

        self.block = stacked(parts.rngs)
        self.final_layer_norm = parts.norm()

    def bias(
        self, query_positions: Int[Array, "#b t"], key_positions: Int[Array, "#b s"]
    ) -> Float[Array, "#b h t s"]:
        """What relative positions add to the scores of every layer, in fp32."""
        found = buckets(
            key_positions[:, None, :] - query_positions[:, :, None],
            both_ways=not self.decoder,
            count=self.config.relative_attention_num_buckets,
            far=self.config.relative_attention_max_distance,
        )
        return self.relative_attention_bias(found).astype(jnp.float32).transpose(0, 3, 1, 2)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        keep: Any,
        bias: Any,
        *,
        encoded: Float[Array, "b s d"] | None = None,
        encoded_keep: Any = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The last hidden state, normalised, and all layers' keys and values."""
        first, rest, last = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = dropout(x, self.config.dropout_rate, first)
        graphdef, state = nnx.split(self.block)
        keys = None if rest is None else jax.random.split(rest, self.layers)
        stores = None if cache is None else (cache.keys, cache.values)
        slot = None if cache is None else cache.length

        def step(carry: tuple[Array, Any], layer: tuple[Any, Any, Any]) -> tuple[Any, None]:
            x, stores = carry
            state, number, key = layer
            block = nnx.merge(graphdef, state)
            kept = (stores, number, slot)
            return block(x, keep, bias, encoded, encoded_keep, kept, key), None

        body = rematerialised(step, self.remat)
        layers = (state, jnp.arange(self.layers), keys)
        (x, stores), _ = jax.lax.scan(body, (x, stores), layers, unroll=self.unroll)
        return dropout(self.final_layer_norm(x), self.config.dropout_rate, last), stores


class T5(nnx.Module):
    """T5 with its head.

    **Arguments:** `config`; `dtype`, what it computes in; `param_dtype`, what its parameters are;
    `remat`, forget each layer's activations and compute them again in the backward pass, or a
    policy of `jax.checkpoint_policies` for what to keep; `unroll`, layers per step of the scans.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = False,
        unroll: int = 1,
    ) -> None:
        self.config, self.dtype = config, dtype
        parts = Parts(config, dtype, param_dtype, rngs)
        self.shared = parts.embed(config.vocab_size, config.d_model, 1.0)
        self.encoder = Stack(parts, decoder=False, remat=remat, unroll=unroll)
        self.decoder = Stack(parts, decoder=True, remat=remat, unroll=unroll)
        if not config.tie_word_embeddings:
            self.lm_head = parts.linear(config.d_model, config.vocab_size, 1.0)

    def __call__(
        self,
        input_ids: Int[Array, "b s"] | None,
        attention_mask: Int[Array, "b s"] | None = None,
        decoder_input_ids: Int[Array, "b t"] | None = None,
        decoder_attention_mask: Int[Array, "b t"] | None = None,
        *,
        encoded: Float[Array, "b s d"] | None = None,
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        hidden: bool = False,
        last: bool = False,
        labels: Int[Array, "b t"] | None = None,
        chunk: int = 1024,
    ) -> Any:
        """The decoder's logits `(b, t, v)`, fp32; with a cache, `(logits, cache)`.

        **Arguments:**

        - `attention_mask` and `decoder_attention_mask`, 1 at tokens and 0 at padding, on either
          side; all ones when left out.
        - `decoder_input_ids`, such as `shift_right(labels)`. Without them the result is the
          encoder's output `(b, s, d)`.
        - `encoded`, that output, so that the encoder does not run again (`input_ids` is not read).
        - `cache`, what the decoder read before: its tokens continue it.
        - `key` switches dropout on.
        - `hidden`, give the last hidden state `(b, t, d)`, which `head` reads, for the logits.
        - `last`, give the logits of each row's last token alone, `(b, 1, v)`.
        - `labels`, give the sum of the losses of each position's label and their count instead, the
          logits made for `chunk` tokens at a time; `decoder_input_ids` are then `shift_right` of
          them where they are left out.

        **Raises:** `ValueError` for neither `input_ids` nor `encoded`, or more tokens than the
        cache's room.
        """
        first, rest = (None, None) if key is None else jax.random.split(key)
        if encoded is None:
            if input_ids is None:
                raise ValueError("the encoder needs input_ids, where there is no encoded")
            encoded = self.encode(input_ids, attention_mask, key=first)
        if decoder_input_ids is None:
            if labels is None:
                return encoded
            decoder_input_ids = self.shift_right(labels)
        if decoder_attention_mask is None:
            # Without padding the rows' positions are the same: one row of biases is enough.
            rows = decoder_input_ids[:1] if cache is None else decoder_input_ids
            decoder_attention_mask = jnp.ones_like(rows)
        positions = positions_of(decoder_attention_mask, cache=cache)
        known = (
            positions if cache is None else caches.write(cache.positions, positions, cache.length)
        )
        x, stores = self.decoder(
            self.shared(decoder_input_ids),
            may_read(positions, known),
            self.decoder.bias(positions, known),
            encoded=encoded.astype(self.dtype),
            encoded_keep=_readable(attention_mask, encoded.shape[1]),
            cache=cache,
            key=rest,
        )
        if labels is not None:
            return next_token_loss(x, self.head, labels, chunk=chunk, shift=False)
        x = last_tokens(x, decoder_attention_mask) if last else x
        out = x if hidden else self.head(x)
        if cache is None:
            return out
        length = cache.length + decoder_input_ids.shape[1]
        return out, Cache(stores[0], stores[1], known, length)

    def encode(
        self,
        input_ids: Int[Array, "b s"],
        attention_mask: Int[Array, "b s"] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b s d"]:
        """The encoder's output, which the decoder reads."""
        s = input_ids.shape[1]
        slots = jnp.arange(s, dtype=jnp.int32)[None]
        bias = self.encoder.bias(slots, slots)
        return self.encoder(self.shared(input_ids), _readable(attention_mask, s), bias, key=key)[0]

    def head(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """The logits, fp32, of last hidden states."""
        c = self.config
        if c.tie_word_embeddings:
            hidden = hidden * jnp.asarray(c.d_model**-0.5, hidden.dtype)
            table = self.shared.embedding[...].astype(self.dtype)
            return wide_dot_general(hidden, table, (((2,), (1,)), ((), ())))
        kernel = self.lm_head.kernel[...].astype(self.dtype)
        return wide_dot_general(hidden, kernel, (((2,), (0,)), ((), ())))

    def shift_right(self, labels: Int[Array, "b t"]) -> Int[Array, "b t"]:
        """The decoder's input for labels: the start token and all labels but the last.

        Labels below 0, which the loss leaves out, become padding.
        """
        c = self.config
        shifted = jnp.roll(labels, 1, axis=1).at[:, 0].set(c.decoder_start_token_id)
        return jnp.where(shifted < 0, c.pad_token_id, shifted)

    def empty_cache(self, batch: int, room: int, dtype: Any = None) -> Cache:
        """A cache of the decoder's for `batch` rows of up to `room` tokens, padding among them."""
        c = self.config
        dtype = self.dtype if dtype is None else dtype
        return caches.empty_cache(c.decoder_layers, batch, room, c.num_heads, c.d_kv, dtype)


def decoder_steps(apply: Any) -> Any:
    """The decoder as `jpeft.generate` calls a model, given a T5's `apply`.

    Its `extra` is `encoded`, the encoder's output `(b, s, d)`, and `encoder_mask` `(b, s)`, the
    attention mask that this was made with.
    """

    def step(
        params: Any, ids: Any, mask: Any, *, cache: Any, last: bool, encoded: Any, encoder_mask: Any
    ) -> Any:
        own = {"encoded": encoded, "cache": cache, "last": last}
        return apply(params, None, encoder_mask, ids, mask, **own)

    return step


def _readable(attention_mask: Int[Array, "b s"] | None, s: int) -> Any:
    """Which of the encoder's positions are read: `(#b, 1, s)`."""
    if attention_mask is None:
        return jnp.ones((1, 1, s), bool)
    return attention_mask.astype(bool)[:, None]
