"""The training steps whose memory is accounted for: as one, or in parts that are summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def step_of(loss: Any, optimiser: optax.GradientTransformation) -> Callable[..., Any]:
    """`step(read, trainable, state, frozen, batch, key)`: the loss reads `read`, and the update the
    same arrays again, as `trainable`. The last of its results is the loss, as of all here.
    """

    def step(read: Any, trainable: Any, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        def mean(trainable: Any) -> Any:
            total, count = _total(loss, trainable, frozen, batch, key)
            return total / jnp.maximum(count, 1)

        value, grads = jax.value_and_grad(mean)(read)
        return *_update(optimiser, grads, trainable, state), value

    return step


def part_of(loss: Any) -> Callable[..., Any]:
    """`part(trainable, sums, frozen, batch, key)`: a part's gradients, added to the sums."""

    def part(trainable: Any, sums: Any, frozen: Any, batch: Any, key: Any) -> Any:
        def total(trainable: Any) -> Any:
            return _total(loss, trainable, frozen, batch, key)[0]

        value, grads = jax.value_and_grad(total)(trainable)
        return jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, grads), value

    return part


def update_of(optimiser: optax.GradientTransformation) -> Callable[..., Any]:
    """`update(sums, trainable, state)`."""

    def update(sums: Any, trainable: Any, state: Any) -> Any:
        return *_update(optimiser, sums, trainable, state), jnp.float32(0)

    return update


def _total(loss: Any, *args: Any) -> tuple[Any, Any]:
    out = loss(*args)
    total, count = out if isinstance(out, tuple) else (out, 1)
    return jnp.asarray(total, jnp.float32), count


def _update(optimiser: Any, grads: Any, trainable: Any, state: Any) -> tuple[Any, Any]:
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    grads = jax.tree.map(lambda g: (g / jnp.maximum(norm, 1)).astype(g.dtype), grads)
    updates, state = optimiser.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state
