"""The loss of next tokens, without the logits of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

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

    Logits are made for about `chunk` tokens of the batch at a time and made again in the backward
    pass, so that `chunk * v` of them are alive instead of `b * t * v`. A chunk has the same
    positions of every row: where rows are on different devices, each makes logits of its own.

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

    @jax.checkpoint
    def step(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = part
        logits = head(x).astype(jnp.float32)
        valid = y != IGNORED
        picked = jnp.take_along_axis(logits, jnp.where(valid, y, 0)[..., None], axis=-1)[..., 0]
        each = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(jnp.where(valid, each, 0.0)), None

    xs = (jnp.moveaxis(parts, 1, 0), jnp.moveaxis(wanted, 1, 0))
    total = jax.lax.scan(step, jnp.float32(0), xs)[0]
    return total, jnp.sum(wanted != IGNORED)
