"""Beam search from a cache, as one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jpeft.generation import Generated, check_room, ids_and_mask
from jpeft.rewrite import lift

_NONE: Mapping[str, Any] = {}
_LOW = -1e9


def beam_search(
    apply: Callable[..., Any],
    params: Any,
    input_ids: Int[Array, "b t"] | np.ndarray,
    attention_mask: Int[Array, "b t"] | np.ndarray | None = None,
    *,
    cache: Any,
    new_tokens: int,
    beams: int = 4,
    length_penalty: float = 1.0,
    early: bool = False,
    stop: Sequence[int] = (),
    pad: int = 0,
    decode_params: Any = None,
    extra: Mapping[str, Any] = _NONE,
) -> Generated:
    """The best of `beams` continuations of each prompt.

    A finished continuation of `n` tokens scores the sum of its log-probabilities over `n **
    length_penalty`. A row ends when none of its running beams, at its present length, could score
    above its worst finished one; with `early`, as soon as it has `beams` finished ones. The choices
    are transformers' (`num_beams`, `early_stopping`), token for token.

    **Arguments:** `cache` and `extra` for the `b` prompts, as `generate`'s: rows are repeated here.
    The others are `generate`'s.

    **Raises:** `ValueError` as `generate`, and for fewer than 1 beam.
    """
    ids, mask = ids_and_mask(input_ids, attention_mask)
    check_room(cache, ids.shape[1], new_tokens)
    if beams < 1:
        raise ValueError(f"beams is at least 1, got {beams}")
    decode_params = params if decode_params is None else decode_params
    static = (apply, beams, new_tokens, float(length_penalty), early, tuple(stop), pad)
    return Generated(*_search(*static, params, decode_params, ids, mask, cache, dict(extra)))


def _take(x: Any, index: Any) -> Any:
    """`x[row, index[row, i]]` for every row."""
    return jax.vmap(lambda a, i: a[i])(x, index)


def _rows(cache: Any, change: Callable[[Any, int], Any]) -> Any:
    """The cache with `change(array, axis of rows)` of each array that has rows."""
    return dataclasses.replace(
        cache,
        keys=change(cache.keys, 1),
        values=change(cache.values, 1),
        positions=change(cache.positions, 0),
    )


@functools.partial(jax.jit, static_argnums=tuple(range(7)))
def _search(
    apply: Any,
    beams: int,
    n: int,
    penalty: float,
    early: bool,
    stop: tuple[int, ...],
    pad: int,
    params: Any,
    decode_params: Any,
    ids: Any,
    mask: Any,
    cache: Any,
    extra: Any,
) -> Any:
    run = functools.partial(lift(apply), last=True)
    b = ids.shape[0]
    keep = max(2, 1 + len(stop)) * beams
    logits, cache = run(params, ids, mask, cache=cache, **extra)
    cache = _rows(cache, lambda x, axis: jnp.repeat(x, beams, axis=axis))
    extra = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), extra)
    first = jnp.repeat(logits[:, 0], beams, axis=0)
    vocabulary = first.shape[-1]
    blank = jnp.full((b, beams, n), pad, jnp.int32)
    # Only the first beam counts at the start: the others are the same prompt.
    scores = jnp.full((b, beams), _LOW).at[:, 0].set(0.0)

    def advance(state: Any, logits: Any) -> Any:
        i, running, scores, done, done_scores, finished, lengths, hopeful, _, _ = state
        logp = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(b, beams, vocabulary)
        total = (logp + scores[:, :, None]).reshape(b, -1)
        best, at = jax.lax.top_k(total, keep)
        source, token = at // vocabulary, (at % vocabulary).astype(jnp.int32)
        sequences = _take(running, source).at[:, :, i].set(token)
        ends = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(at, bool)
        ends = ends | (i + 1 == n)
        # The beams that go on.
        live = best + ends * _LOW
        chosen = jax.lax.top_k(live, beams)[1]
        new_running, new_scores = _take(sequences, chosen), _take(live, chosen)
        parents = _take(source, chosen)
        # The beams that end here, of the first `beams` candidates, among those that ended before.
        just = ends & (jnp.arange(keep) < beams)
        final = best / (i + 1) ** penalty
        full = jnp.all(finished, axis=1, keepdims=True) & early
        final = final + full * _LOW + ~hopeful * _LOW + ~just * _LOW
        all_scores = jnp.concatenate([done_scores, final], axis=1)
        pick = jax.lax.top_k(all_scores, beams)[1]
        done = _take(jnp.concatenate([done, sequences], axis=1), pick)
        lengths = _take(jnp.concatenate([lengths, jnp.full_like(at, i + 1)], axis=1), pick)
        done_scores = _take(all_scores, pick)
        finished = _take(jnp.concatenate([finished, just], axis=1), pick)
        # Could a running beam, as long as it is now, still beat the worst finished one?
        hope = new_scores[:, :1] / (i + 1) ** penalty
        worst = jnp.where(finished, jnp.min(done_scores, axis=1, keepdims=True), _LOW)
        hopeful = hopeful & jnp.any(hope > worst, axis=1, keepdims=True)
        going = jnp.any(hopeful) & ~(jnp.all(finished) & early) & ~jnp.all(ends)
        return (
            *(i + 1, new_running, new_scores, done, done_scores, finished, lengths, hopeful),
            *(going, parents),
        )

    state = (
        jnp.int32(0),
        blank,
        scores,
        blank,
        jnp.full((b, beams), _LOW),
        jnp.zeros((b, beams), bool),
        jnp.zeros((b, beams), jnp.int32),
        jnp.ones((b, 1), bool),
        jnp.array(True),
        jnp.zeros((b, beams), jnp.int32),
    )
    state = advance(state, first)

    def step(carry: Any) -> Any:
        state, cache = carry
        i, running, parents = state[0], state[1], state[-1]
        rows = (parents + jnp.arange(b)[:, None] * beams).reshape(-1)
        cache = _rows(cache, lambda x, axis: jnp.take(x, rows, axis=axis))
        token = jax.lax.dynamic_index_in_dim(running, i - 1, 2, keepdims=False).reshape(-1, 1)
        logits, cache = run(decode_params, token, jnp.ones_like(token), cache=cache, **extra)
        return advance(state, logits[:, 0]), cache

    state, _ = jax.lax.while_loop(lambda c: c[0][-2], step, (state, cache))
    done, done_scores, lengths = state[3][:, 0], state[4][:, 0], state[6][:, 0]
    return done, lengths, done_scores
