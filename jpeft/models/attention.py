"""Full attention, and a form of it for CPUs that keeps no probabilities for the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jpeft._cpu_products import KEPT
from jpeft.models.layers import dropout


def attention(
    query_btd: Float[Array, "b t d"],
    key_bsd: Float[Array, "b s d"],
    value_bsd: Float[Array, "b s d"],
    keep_bs: Bool[Array, "b s"],
    *,
    heads: int,
    rate: float = 0.0,
    key: PRNGKeyArray | None = None,
    rows: int | None = None,
) -> Float[Array, "b t d"]:
    """Full attention among the positions that `keep_bs` marks, heads side by side in `d`.

    The softmax is in fp32. Dropout, when a key is given, is on the probabilities. A row with no
    position to attend to attends to all of them alike, and is not NaN.

    **Arguments:** `rows`, the examples worked on at a time: small pieces stay in a CPU's cache,
    and their gradient is written out by hand in the order of operands that CPUs multiply fastest
    (`jax.vjp` and `jax.grad` only, no forward mode). Their products are in fp32, of bf16 too, of
    which XLA for CPUs rounds the operands and multiplies in fp32 all the same. None, and whenever
    there is dropout: all at once, with JAX's own derivative.

    Source: Vaswani et al. 2017, equation 1.
    """
    # Finite, so that a row without any kept position has a softmax.
    bias = jnp.where(keep_bs[:, None, None, :], 0.0, -1e9)
    if rows is not None and (key is None or rate == 0):
        return _pieces(query_btd, key_bsd, value_bsd, bias, heads=heads, rows=rows)
    query, keys, value = (_split(x, heads) for x in (query_btd, key_bsd, value_bsd))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, keys)
    weights = jax.nn.softmax(scores.astype(jnp.float32) + bias, axis=-1).astype(value.dtype)
    weights = checkpoint_name(weights, KEPT)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", dropout(weights, rate, key), value)
    return _join(checkpoint_name(mixed, KEPT))


def _split(x: Float[Array, "b t d"], heads: int) -> Float[Array, "b h t w"]:
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _wide(x: Float[Array, "b t d"], heads: int) -> Float[Array, "b h t w"]:
    return _split(x, heads).astype(jnp.promote_types(x.dtype, jnp.float32))


def _join(x: Float[Array, "b h t w"]) -> Float[Array, "b t d"]:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnames=("heads", "rows"))
def _pieces(query: Any, key: Any, value: Any, bias: Any, heads: int, rows: int) -> Any:
    return _forward(query, key, value, bias, heads, rows)[0]


def _forward(query: Any, key: Any, value: Any, bias: Any, heads: int, rows: int) -> Any:
    given = query, key, value, bias
    # The gradient is one rule for all pieces: that of each slice would be padded to the whole.
    out = jnp.concatenate([_attended(*cut, heads=heads) for cut in _cuts(given, rows)])
    return checkpoint_name(out, KEPT), given


def _cuts(arrays: tuple[Any, ...], rows: int) -> list[tuple[Any, ...]]:
    """Every array's rows, so many at a time."""
    return [tuple(x[i : i + rows] for x in arrays) for i in range(0, arrays[0].shape[0], rows)]


def _attended(query: Any, key: Any, value: Any, bias: Any, heads: int) -> Any:
    q, k, v = (_wide(x, heads) for x in (query, key, value))
    powers, total = _softmax(q, k, bias)
    out = jnp.einsum("bhqk,bhkd->bhqd", powers, v) / total
    return _join(out.astype(query.dtype))


def _softmax(q: Any, k: Any, bias: Any) -> tuple[Any, Any]:
    """The softmax's numerator and denominator, apart: dividing the output is less work."""
    scores = jnp.einsum("bhqd,bhdk->bhqk", q * q.shape[-1] ** -0.5, k.swapaxes(2, 3)) + bias
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return powers, jnp.sum(powers, axis=-1, keepdims=True)


def _backward(heads: int, rows: int, saved: Any, g_out: Any) -> Any:
    """The gradient, with scores computed again; Dao et al. 2022, appendix B.2."""
    pieces = [_pulled_back(*cut, heads=heads) for cut in _cuts((*saved, g_out), rows)]
    query, key, value = (jnp.concatenate(x) for x in zip(*pieces, strict=True))
    return query, key, value, jnp.zeros_like(saved[3])


def _pulled_back(
    query: Any, key: Any, value: Any, bias: Any, g_out: Any, heads: int
) -> tuple[Any, ...]:
    q, k, v, g_out = (_wide(x, heads) for x in (query, key, value, g_out))
    powers, total = _softmax(q, k, bias)
    # Turned round before the division, and kept so: else the product takes the turn into itself.
    g_turned = jax.lax.optimization_barrier(g_out.swapaxes(2, 3) / total.swapaxes(2, 3))
    g_value = jnp.einsum("bhdq,bhqk->bhdk", g_turned, powers)
    g_powers = jnp.einsum("bhqd,bhdk->bhqk", g_out / total, v.swapaxes(2, 3))
    # Of whole rows at hand: the output, of which the paper has this sum, need not be kept.
    shift = jnp.sum(powers * g_powers, axis=-1, keepdims=True) / total
    g_scores = powers * (g_powers - shift)
    scale = q.shape[-1] ** -0.5
    g_query = jnp.einsum("bhqk,bhkd->bhqd", g_scores, k) * scale
    g_key = jnp.einsum("bhdq,bhqk->bhdk", q.swapaxes(2, 3) * scale, g_scores)
    found = g_query, g_key.swapaxes(2, 3), g_value.swapaxes(2, 3)
    return tuple(_join(g).astype(x.dtype) for g, x in zip(found, (query, key, value), strict=True))


_pieces.defvjp(_forward, _backward)
