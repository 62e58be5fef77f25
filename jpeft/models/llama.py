"""Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3: one decoder with a head for the next token.

Touvron et al. 2023; Jiang et al. 2023; Qwen Team 2024, 2025; Gemma Team 2024, 2025. The layers are
stacked along axis 0 of their parameters and scanned. Names in paths are Hugging Face's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft.models.cache import Cache, empty_cache, positions_of, remember, write
from jpeft.models.causal import Implementation, causal_attention, may_read
from jpeft.models.layers import Remat, gated, last_tokens, rematerialised, wide_dot_general
from jpeft.models.llama_config import FULL, SLIDING
from jpeft.models.llama_config import LlamaConfig as LlamaConfig
from jpeft.models.loss import next_token_loss
from jpeft.models.norms import RMSNorm
from jpeft.models.rope import rotate, rotation
from jpeft.models.shifted import shifted_attention

# What each axis of a parameter is, by a pattern of its path.
AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed_tokens/embedding$", ("vocab", "embed")),
    (r"lm_head/kernel$", ("embed", "vocab")),
    (r"self_attn/q_proj/kernel$", ("layers", "embed", "heads")),
    (r"self_attn/[kv]_proj/kernel$", ("layers", "embed", "kv_heads")),
    (r"self_attn/o_proj/kernel$", ("layers", "heads", "embed")),
    (r"self_attn/q_proj/bias$", ("layers", "heads")),
    (r"self_attn/[kv]_proj/bias$", ("layers", "kv_heads")),
    (r"mlp/(gate|up)_proj/kernel$", ("layers", "embed", "mlp")),
    (r"mlp/(gate|up)_proj/bias$", ("layers", "mlp")),
    (r"mlp/down_proj/kernel$", ("layers", "mlp", "embed")),
    (r"(o|down)_proj/bias$", ("layers", "embed")),
    (r"[qk]_norm/scale$", ("layers", "head_dim")),
    (r"layers/\w+_layernorm/scale$", ("layers", "embed")),
    (r"model/norm/scale$", ("embed",)),
)
# The window of a layer that reads everything, where other layers have one.
_UNBOUNDED = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How this model makes its layers: one place for types and initial values."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    rngs: nnx.Rngs

    @property
    def normal(self) -> Any:
        return nnx.initializers.normal(self.config.initializer_range)

    def linear(self, n_in: int, n_out: int, bias: bool = False, **options: Any) -> nnx.Linear:
        return nnx.Linear(
            n_in,
            n_out,
            use_bias=bias,
            kernel_init=self.normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
            **options,
        )

    def norm(self, width: int | None = None) -> RMSNorm:
        c = self.config
        width = c.hidden_size if width is None else width
        return RMSNorm(width, c.rms_norm_eps, self.dtype, self.param_dtype, c.gemma)

    def embed(self) -> nnx.Embed:
        return nnx.Embed(
            self.config.vocab_size,
            self.config.hidden_size,
            embedding_init=self.normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What all layers share in one call.

    **Attributes:** `attend(query, key, value, sliding)`, attention of a layer; `turns`, cosine and
    sine `(b, t, half)`, stacked over the model's rotary embeddings; `slot`, where a cache is
    written.
    """

    attend: Callable[[Array, Array, Array, Any], Array]
    turns: tuple[Array, Array]
    slot: Any


class SelfAttention(nnx.Module):
    """Attention with grouped heads and rotary embeddings."""

    def __init__(self, parts: _Parts) -> None:
        c = self.config = parts.config
        d, queries, keys = c.hidden_size, c.num_attention_heads * c.width, c.kv_heads * c.width
        self.q_proj = parts.linear(d, queries, c.qkv_bias)
        self.k_proj = parts.linear(d, keys, c.qkv_bias)
        self.v_proj = parts.linear(d, keys, c.qkv_bias)
        self.o_proj = parts.linear(queries, d, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = parts.norm(c.width), parts.norm(c.width)

    def __call__(
        self, x: Float[Array, "b t d"], reading: _Reading, at: Any, stores: Any
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The mixed values, and `stores`, keys and values of all layers, with this one's."""
        c = self.config
        b, t, _ = x.shape
        query = self.q_proj(x).reshape(b, t, c.num_attention_heads, c.width)
        key = self.k_proj(x).reshape(b, t, c.kv_heads, c.width)
        value = self.v_proj(x).reshape(b, t, c.kv_heads, c.width)
        if c.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        # Only models with a local rotary embedding choose among two.
        cos, sin = (x[0] if len(x) == 1 else x[at.sliding] for x in reading.turns)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        stores, key, value = remember(stores, at.layer, reading.slot, key, value)
        mixed = reading.attend(query, key, value, at.sliding)
        return self.o_proj(mixed.reshape(b, t, -1)), stores


class MLP(nnx.Module):
    """The gated MLP (Shazeer 2020)."""

    def __init__(self, parts: _Parts) -> None:
        c = parts.config
        bias = c.mlp_bias and c.model_type == "llama"
        self.gated = gated(c.hidden_act)
        self.gate_proj = parts.linear(c.hidden_size, c.intermediate_size, bias)
        self.up_proj = parts.linear(c.hidden_size, c.intermediate_size, bias)
        self.down_proj = parts.linear(c.intermediate_size, c.hidden_size, bias)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """`(act(x G) * (x U)) D`."""
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _At:
    """Which layer it is: its number, and 1 where it has the sliding window, int32 scalars."""

    layer: Any
    sliding: Any


class Layer(nnx.Module):
    """One layer, normalised before attention and MLP; Gemma's also after both."""

    def __init__(self, parts: _Parts) -> None:
        self.gemma = parts.config.gemma
        self.self_attn = SelfAttention(parts)
        self.mlp = MLP(parts)
        self.input_layernorm = parts.norm()
        self.post_attention_layernorm = parts.norm()
        if self.gemma:
            self.pre_feedforward_layernorm = parts.norm()
            self.post_feedforward_layernorm = parts.norm()

    def __call__(
        self, x: Float[Array, "b t d"], reading: _Reading, at: Any, stores: Any
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The layer's output, and the stores with its keys and values."""
        mixed, stores = self.self_attn(self.input_layernorm(x), reading, at, stores)
        if not self.gemma:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x)), stores
        x = x + self.post_attention_layernorm(mixed)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out), stores


class Decoder(nnx.Module):
    """The model without its head; `layers` is stacked along axis 0 of every parameter."""

    def __init__(
        self,
        parts: _Parts,
        *,
        remat: Remat,
        unroll: int,
        shifted: int | None = None,
        implementation: Implementation = None,
    ) -> None:
        self.config, self.remat, self.unroll = parts.config, remat, unroll
        self.shifted, self.implementation = shifted, implementation
        self.embed_tokens = parts.embed()

        @nnx.split_rngs(splits=parts.config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(dataclasses.replace(parts, rngs=rngs))

        self.layers = stacked(parts.rngs)
        self.norm = parts.norm()

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        cache: Cache | None,
        whole: bool,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """The last hidden state, normalised, and the cache with the new tokens.

        **Arguments:** `whole`, whether every row is one text without padding, from its start.
        """
        c = self.config
        stores: Any = None
        slot, key_positions = None, positions
        if cache is not None:
            slot, stores = cache.length, (cache.keys, cache.values)
            key_positions = write(cache.positions, positions, slot)
        ropes = [c.rope] if c.local_rope is None else [c.rope, c.local_rope]
        turns = [rotation(rope, positions, c.width) for rope in ropes]
        reading = _Reading(
            self._attention(positions, key_positions, segment_ids, cache is None, whole),
            (jnp.stack([cos for cos, _ in turns]), jnp.stack([sin for _, sin in turns])),
            slot,
        )
        x = self.embed_tokens(input_ids)
        if c.gemma:
            # In the embeddings' own type, as theirs: in bf16 the root is rounded too.
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        x, stores = self._scan(x, reading, stores)
        if cache is not None:
            keys, values = stores
            cache = Cache(keys, values, key_positions, cache.length + input_ids.shape[1])
        return self.norm(x), cache

    def _attention(
        self, queries: Array, keys: Array, segments: Array | None, sparse: bool, whole: bool
    ) -> Callable[[Array, Array, Array, Any], Array]:
        """`attend`, given the positions of queries and keys."""
        c = self.config
        window = c.sliding_window if SLIDING in c.kinds else None
        options: dict[str, Any] = {
            "scale": c.scale,
            "softcap": c.attn_logit_softcapping,
            "implementation": self.implementation,
        }
        mixed = window is not None and FULL in c.kinds

        def of_layer(sliding: Any) -> Any:
            if window is None or not mixed:
                return window
            return jnp.where(sliding == 1, window, _UNBOUNDED)

        def keep(window: Any) -> Array:
            return may_read(
                queries, keys, window=window, query_segments=segments, key_segments=segments
            )

        if sparse and self.shifted is not None:
            options |= {"group": self.shifted}
            return lambda q, k, v, sliding: shifted_attention(
                q, k, v, queries, segments, window=of_layer(sliding), **options
            )
        if whole and window is None:
            return lambda q, k, v, sliding: causal_attention(q, k, v, None, **options)
        if mixed:
            return lambda q, k, v, sliding: causal_attention(
                q, k, v, keep(of_layer(sliding)), **options
            )
        # All layers alike: computed once.
        once = keep(window)
        return lambda q, k, v, sliding: causal_attention(q, k, v, once, **options)

    def _scan(self, x: Array, reading: _Reading, stores: Any) -> tuple[Array, Any]:
        graphdef, state = nnx.split(self.layers)
        kinds = self.config.kinds
        sliding = jnp.asarray([kind == SLIDING for kind in kinds], jnp.int32)
        at = _At(jnp.arange(len(kinds), dtype=jnp.int32), sliding)

        def step(carry: tuple[Array, Any], xs: tuple[Any, _At]) -> tuple[Any, None]:
            x, stores = carry
            return nnx.merge(graphdef, xs[0])(x, reading, xs[1], stores), None

        body = rematerialised(step, self.remat)
        return jax.lax.scan(body, (x, stores), (state, at), unroll=self.unroll)[0]


class Llama(nnx.Module):
    """The decoder with its head; a tied head reads the embedding's parameter.

    **Arguments:** `config`; `dtype`, what it computes in (norms, softmax and logits are in fp32);
    `param_dtype`, what its parameters are; `remat`, forget each layer's activations and compute
    them again in the backward pass, or a policy of `jax.checkpoint_policies` for what to keep;
    `unroll`, layers per step of the scan; `shifted`, the size of the groups of LongLoRA's sparse
    attention, which is for training: with a cache attention is always whole; `implementation`, of
    attention, as `causal_attention`'s.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = False,
        unroll: int = 1,
        shifted: int | None = None,
        implementation: Implementation = None,
    ) -> None:
        parts = _Parts(config, dtype, param_dtype, rngs)
        self.config, self.dtype = config, dtype
        self.model = Decoder(
            parts, remat=remat, unroll=unroll, shifted=shifted, implementation=implementation
        )
        if not config.tie_word_embeddings:
            self.lm_head = parts.linear(
                config.hidden_size, config.vocab_size, dot_general=wide_dot_general
            )

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
        """The logits, fp32 `(b, t, v)`; with a cache `(logits, cache)`.

        **Arguments:**

        - `attention_mask`, 1 at tokens and 0 at padding, on either side; all ones when left out,
          which lets cuDNN's attention leave out the half that nobody reads.
        - `position_ids`, where they do not count the tokens, from the cache's or from each
          segment's start.
        - `segment_ids`, which of several texts in a row a token belongs to: none reads another.
        - `cache`, what was read before; these tokens go into its next slots.
        - `key` is there for all models to be called alike: this one has no dropout.
        - `hidden`, return in place of the logits what `head` makes them from, `(b, t, d)`.
        - `last`, return the logits of each row's last token alone, `(b, 1, v)`.
        - `labels`, return the sum of the losses of next tokens and their count instead, the logits
          made for `chunk` tokens at a time: `next_token_loss`.

        **Raises:** `ValueError` for segments with a cache, or more tokens than it has room for.
        """
        del key
        given = (attention_mask, position_ids, segment_ids, cache)
        whole = all(x is None for x in given)
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        positions = positions_of(
            attention_mask, position_ids=position_ids, segment_ids=segment_ids, cache=cache
        )
        x, cache = self.model(input_ids, positions, segment_ids, cache, whole)
        if labels is not None:
            return next_token_loss(x, self.head, labels, chunk=chunk)
        x = last_tokens(x, attention_mask) if last else x
        out = x if hidden else self.head(x)
        return out if cache is None else (out, cache)

    def head(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """The logits of normalised hidden states, fp32."""
        if self.config.tie_word_embeddings:
            table = self.model.embed_tokens.embedding[...].astype(self.dtype)
            logits = wide_dot_general(hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())))
        else:
            logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, batch: int, room: int, dtype: Any = None) -> Cache:
        """A cache with room for so many tokens in each row, padding counted."""
        c = self.config
        dtype = self.dtype if dtype is None else dtype
        return empty_cache(c.num_hidden_layers, batch, room, c.kv_heads, c.width, dtype)
