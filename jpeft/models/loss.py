"""The loss of next tokens, without the logits of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -100


def next_token_loss(
    hidden: Float[Array, "b t d"],
    head: Callable[[Float[Array, "1 n d"]], Float[Array, "1 n v"]],
    labels: Int[Array, "b t"],
    *,
    chunk: int = 1024,
    shift: bool = True,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of cross-entropies in nats (fp32), and how many tokens it is over.

    Logits are made for `chunk` tokens at a time and made again in the backward pass, so that
    `chunk * v` of them are alive instead of `b * t * v`.

    **Arguments:** `hidden`, what the head reads; `head`, to logits; `labels`, with -100 where there
    is no loss; `shift`, whether position `i` is to foretell label `i + 1` (a decoder whose labels
    are its inputs), else label `i`.
    """
    if shift:
        last = jnp.full_like(labels[:, :1], IGNORED)
        labels = jnp.concatenate([labels[:, 1:], last], axis=1)
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    n = flat.shape[0]
    size = min(chunk, n)
    rest = -n % size
    flat = jnp.pad(flat, ((0, rest), (0, 0))).reshape(-1, size, flat.shape[-1])
    wanted = jnp.pad(wanted, (0, rest), constant_values=IGNORED).reshape(-1, size)

    @jax.checkpoint
    def step(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = part
        logits = head(x[None])[0].astype(jnp.float32)
        valid = y != IGNORED
        picked = jnp.take_along_axis(logits, jnp.where(valid, y, 0)[:, None], axis=1)[:, 0]
        each = jax.nn.logsumexp(logits, axis=1) - picked
        return total + jnp.sum(jnp.where(valid, each, 0.0)), None

    total = jax.lax.scan(step, jnp.float32(0), (flat, wanted))[0]
    return total, jnp.sum(wanted != IGNORED)
