"""Text from a decoder: greedy, sampled or by beam search, from a cache, as one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jpeft.rewrite import lift

_NONE: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    **Arguments:** `temperature`, 0 for the likeliest token always; `top_k`, among so many likeliest
    tokens (Fan et al. 2018); `top_p`, among the fewest likeliest ones whose probabilities reach
    `top_p` together (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is in (0, 1], got {self.top_p}")

    def __call__(self, logits: Float[Array, "b v"], key: PRNGKeyArray | None) -> Int[Array, " b"]:
        """The chosen tokens. **Raises:** `ValueError` where a key is needed and there is none."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if key is None:
            raise ValueError("a temperature above 0 draws tokens: give a key")
        logits = self.allowed(logits.astype(jnp.float32) / self.temperature)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def allowed(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """The logits with minus infinity where `top_k` and `top_p` leave a token out."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probability = jax.nn.softmax(ordered, axis=-1)
            # A token stays while those before it have not reached top_p: the first always stays.
            before = jnp.cumsum(probability, axis=-1) - probability
            kept = jnp.where(before < self.top_p, ordered, jnp.inf)
            logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
        return logits


class Generated(NamedTuple):
    """`tokens`, int32 `(b, n)`: the new ones, then padding; `lengths`, `(b,)`: how many are new, a
    stop token counted; `scores`, `(b,)`: of a beam search, else None.
    """

    tokens: Any
    lengths: Any
    scores: Any = None


def left_padded(
    prompts: Sequence[Sequence[int]], pad: int = 0, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as `input_ids` and `attention_mask`, `(b, t)`, ends aligned.

    **Arguments:** `length`, of all rows; one number for many batches is one compilation. None is
    the longest prompt's.

    **Raises:** `ValueError` for an empty prompt, or one longer than `length`.
    """
    longest = max((len(p) for p in prompts), default=0)
    t = longest if length is None else length
    if not prompts or any(not len(p) for p in prompts) or longest > t:
        raise ValueError(f"prompts have 1 to {t} tokens, got {[len(p) for p in prompts]}")
    ids = np.full((len(prompts), t), pad, np.int32)
    mask = np.zeros((len(prompts), t), np.int32)
    for i, prompt in enumerate(prompts):
        ids[i, t - len(prompt) :] = prompt
        mask[i, t - len(prompt) :] = 1
    return ids, mask


def generate(
    apply: Callable[..., Any],
    params: Any,
    input_ids: Int[Array, "b t"] | np.ndarray,
    attention_mask: Int[Array, "b t"] | np.ndarray | None = None,
    *,
    cache: Any,
    new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    pad: int = 0,
    key: PRNGKeyArray | None = None,
    decode_params: Any = None,
    extra: Mapping[str, Any] = _NONE,
) -> Generated:
    """Up to `new_tokens` tokens after each prompt, in one compiled program.

    **Arguments:**

    - `apply(params, input_ids, attention_mask, cache=cache, last=True, **extra) -> (logits,
      cache)`, the logits of each row's last token, `(b, 1, v)`: `jpeft.functional(model)`'s. The
      same function object is the same compilation.
    - `params`, ordinary or rewritten by any method.
    - `attention_mask`, 0 at padding, on either side of a prompt.
    - `cache`, empty, with room for `t + new_tokens` tokens: `model.empty_cache(b, room)`.
    - `stop`, tokens that end a row; `pad`, what stands after one.
    - `decode_params`, what the steps after the prompt read: `transform.decoding().rewrite(...)` for
      prompts and prefixes, which are in the cache by then. None is `params`.
    - `extra`, further arguments of `apply`, such as an encoder's output.

    **Raises:** `ValueError` for a cache without the room, or no key where tokens are drawn.
    """
    ids, mask = ids_and_mask(input_ids, attention_mask)
    check_room(cache, ids.shape[1], new_tokens)
    if sampling.temperature > 0 and key is None:
        raise ValueError("a temperature above 0 draws tokens: give a key")
    decode_params = params if decode_params is None else decode_params
    arrays = (params, decode_params, ids, mask, cache, key, dict(extra))
    return Generated(*_generate(apply, sampling, new_tokens, tuple(stop), pad, *arrays))


def stream(
    apply: Callable[..., Any],
    params: Any,
    input_ids: Int[Array, "b t"] | np.ndarray,
    attention_mask: Int[Array, "b t"] | np.ndarray | None = None,
    *,
    cache: Any,
    new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    pad: int = 0,
    key: PRNGKeyArray | None = None,
    decode_params: Any = None,
    extra: Mapping[str, Any] = _NONE,
) -> Iterator[np.ndarray]:
    """As `generate`, each step's tokens `(b,)` as soon as they are there: the same ones."""
    ids, mask = ids_and_mask(input_ids, attention_mask)
    check_room(cache, ids.shape[1], new_tokens)
    decode_params = params if decode_params is None else decode_params
    done = jnp.zeros(ids.shape[0], bool)
    for i in range(new_tokens):
        own = params if i == 0 else decode_params
        at = None if key is None else jax.random.fold_in(key, i)
        picked, done, cache = _step(
            apply, sampling, tuple(stop), pad, own, ids, mask, cache, at, done, dict(extra)
        )
        yield np.asarray(picked)
        if bool(jnp.all(done)):
            return
        ids = picked[:, None]
        mask = jnp.ones_like(ids)


def ids_and_mask(ids: Any, mask: Any) -> tuple[Array, Array]:
    """Both as int32 arrays; a mask that was left out is all ones."""
    ids = jnp.asarray(ids, jnp.int32)
    return ids, jnp.ones_like(ids) if mask is None else jnp.asarray(mask, jnp.int32)


def check_room(cache: Any, prompt: int, new: int) -> None:
    """**Raises:** `ValueError` for a cache without room for a prompt and what follows it."""
    if new < 1:
        raise ValueError(f"new_tokens is at least 1, got {new}")
    if cache.room < prompt + new:
        raise ValueError(
            f"the cache has room for {cache.room} tokens, the prompt and what follows are {prompt} "
            f"+ {new}"
        )


def _pick(
    logits: Any, sampling: Sampling, stop: tuple[int, ...], pad: int, key: Any, done: Any
) -> tuple[Any, Any]:
    picked = jnp.where(done, pad, sampling(logits, key))
    ended = jnp.isin(picked, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros_like(done)
    return picked, done | ended


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _step(
    apply: Any,
    sampling: Sampling,
    stop: tuple[int, ...],
    pad: int,
    params: Any,
    ids: Any,
    mask: Any,
    cache: Any,
    key: Any,
    done: Any,
    extra: Any,
) -> Any:
    logits, cache = lift(apply)(params, ids, mask, cache=cache, last=True, **extra)
    return *_pick(logits[:, 0], sampling, stop, pad, key, done), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(
    apply: Any,
    sampling: Sampling,
    n: int,
    stop: tuple[int, ...],
    pad: int,
    params: Any,
    decode_params: Any,
    ids: Any,
    mask: Any,
    cache: Any,
    key: Any,
    extra: Any,
) -> Any:
    run = functools.partial(lift(apply), last=True)

    def at(i: Any) -> Any:
        return None if key is None else jax.random.fold_in(key, i)

    logits, cache = run(params, ids, mask, cache=cache, **extra)
    never = jnp.zeros(ids.shape[0], bool)
    picked, done = _pick(logits[:, 0], sampling, stop, pad, at(0), never)
    tokens = jnp.full((ids.shape[0], n), pad, jnp.int32).at[:, 0].set(picked)
    lengths = jnp.ones(ids.shape[0], jnp.int32)

    def going(carry: Any) -> Any:
        i, _, _, _, _, done = carry
        return (i < n) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, picked, tokens, lengths, cache, done = carry
        # A row that has ended reads on: its length counts where rotary frequencies depend on it.
        token = picked[:, None]
        logits, cache = run(decode_params, token, jnp.ones_like(token), cache=cache, **extra)
        lengths = lengths + ~done
        picked, done = _pick(logits[:, 0], sampling, stop, pad, at(i), done)
        return i + 1, picked, tokens.at[:, i].set(picked), lengths, cache, done

    carry = (jnp.int32(1), picked, tokens, lengths, cache, done)
    _, _, tokens, lengths, _, _ = jax.lax.while_loop(going, step, carry)
    return tokens, lengths
