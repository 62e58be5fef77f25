"""The loss of next tokens, without the logits of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -100


def next_token_loss(
    hidden: Float[Array, "b t d"],
    head: Callable[[Float[Array, "b n d"]], Float[Array, "b n v"]],
    labels: Int[Array, "b t"],
    *,
    chunk: int = 1024,
    shift: bool = True,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of cross-entropies in nats (fp32), and how many tokens it is over.

    Logits are made for about `chunk` tokens of the batch at a time, so that `chunk * v` of them are
    alive instead of `b * t * v`. Where the head is trained they are made again in the backward
    pass, unless there is one chunk alone; where it is frozen, the gradient of what it reads is made
    in the forward pass, from the same logits. A chunk has the same positions of every row: where
    rows are on different devices, each makes logits of its own. It has a reverse-mode derivative
    alone (second ones through it).

    **Arguments:** `hidden`, what the head reads; `head`, to logits; `labels`, with -100 where there
    is no loss; `shift`, whether position `i` is to foretell label `i + 1` (a decoder whose labels
    are its inputs), else label `i`.
    """
    if shift:
        last = jnp.full_like(labels[:, :1], IGNORED)
        labels = jnp.concatenate([labels[:, 1:], last], axis=1)
    b, t, d = hidden.shape
    size = min(max(chunk // b, 1), t)
    rest = -t % size
    parts = jnp.pad(hidden, ((0, 0), (0, rest), (0, 0))).reshape(b, -1, size, d)
    wanted = jnp.pad(labels, ((0, 0), (0, rest)), constant_values=IGNORED).reshape(b, -1, size)

    xs, ys = jnp.moveaxis(parts, 1, 0), jnp.moveaxis(wanted, 1, 0)
    # What the head reads has to be an operand of what has a rule of its own.
    logits_of, read = jax.closure_convert(head, xs[0])
    return _total(logits_of, xs, ys, read), jnp.sum(wanted != IGNORED)


def _total(logits_of: Any, xs: Any, ys: Any, read: Sequence[Any]) -> Any:
    """The sum over chunks. Where `read` is not differentiated, the gradient of `xs` is made beside
    the loss, from the same logits: two products with the head and not three.
    """

    def each(x: Any, y: Any, *read: Any) -> Any:
        return _cross_entropy(logits_of(x, *read).astype(jnp.float32), y)

    def summed(xs: Any, ys: Any, *read: Any) -> Any:
        def step(total: Any, part: Any) -> tuple[Any, None]:
            return total + each(*part, *read), None

        # Of a single chunk the backward pass would make logits again that it has just had.
        body = jax.checkpoint(step) if xs.shape[0] > 1 else step
        return jax.lax.scan(body, jnp.float32(0), (xs, ys))[0]

    # By its name (`jpeft._control.SAVES_WORK`) it is known where a rewritten head is read.
    def jpeft_next_token_loss(xs: Any, ys: Any, *read: Any) -> Any:
        return summed(xs, ys, *read)

    def forward(xs: Any, ys: Any, *read: Any) -> tuple[Any, Any]:
        trained = any(x.perturbed for x in read)
        xs, ys, read = xs.value, ys.value, tuple(x.value for x in read)
        if trained:
            return jax.vjp(lambda xs, *read: summed(xs, ys, *read), xs, *read)

        def step(total: Any, part: Any) -> tuple[Any, Any]:
            x, y = part
            loss, pullback = jax.vjp(lambda x: each(x, y, *read), x)
            return total + loss, pullback(jnp.float32(1))[0]

        return jax.lax.scan(step, jnp.float32(0), (xs, ys))

    def backward(kept: Any, g: Any) -> Any:
        if not isinstance(kept, jax.Array):
            move, *rest = kept(g)
            return move, None, *rest
        return (g * kept).astype(kept.dtype), None, *(None for _ in read)

    rule = jax.custom_vjp(jpeft_next_token_loss)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule(xs, ys, *read)


@jax.custom_jvp
def _cross_entropy(logits: Any, labels: Any) -> Any:
    return _with_softmax(logits, labels)[0]


def _with_softmax(logits: Any, labels: Any) -> tuple[Any, Any]:
    """The sum, and each token's probabilities."""
    valid = labels != IGNORED
    picked = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], axis=-1)
    most = jnp.max(logits, axis=-1, keepdims=True)
    # Read by the loss and by its gradient: made twice, YNNPACK holds one of the two out of sight.
    above = jnp.exp(logits - most)
    norms = jnp.sum(above, axis=-1, keepdims=True)
    each = (jnp.log(norms) + most - picked)[..., 0]
    return jnp.sum(jnp.where(valid, each, 0.0)), above / norms


@_cross_entropy.defjvp
def _derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
    # Labels are found by comparing, in one pass over the logits with the rest: the gradient of a
    # look-up is scattered into zeros of their size.
    logits, labels = primals
    total, chances = _with_softmax(logits, labels)
    at = labels[..., None]
    move = chances - (jnp.arange(logits.shape[-1]) == at)
    return total, jnp.sum(jnp.where(at != IGNORED, move, 0.0) * tangents[0])
