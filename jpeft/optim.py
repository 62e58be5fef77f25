"""Optimisers of fine-tuning: LoRA+'s groups of learning rates."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_rate: optax.ScalarOrSchedule | None = 1e-6,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW whose B matrices, and everything of one axis, learn `ratio` times as fast as A.

    Norms and biases (one axis, or one beside the stacked layers') have no weight decay; a LoRA of
    an embedding has a rate of its own.

    **Arguments:** `learning_rate`, a number or a schedule, of the A matrices and of all else;
    `embedding_rate`, None for `learning_rate`.

    **Raises:** `ValueError` for a ratio that is not above zero.

    Source: Hayou et al. 2024; the groups are those of the reference code.
    """
    if ratio <= 0:
        raise ValueError(f"LoRA+'s ratio must be above 0, got {ratio}")

    def adamw(rate: Any, decay: float) -> optax.GradientTransformation:
        return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)

    fast = _times(learning_rate, ratio)
    rate = learning_rate if embedding_rate is None else embedding_rate
    return optax.partition(
        {
            "a": adamw(learning_rate, weight_decay),
            "b": adamw(fast, weight_decay),
            "b without decay": adamw(fast, 0.0),
            "embedding": adamw(rate, weight_decay),
        },
        lora_plus_groups,
    )


def lora_plus_groups(trainable: Any) -> Any:
    """The group of every array: `a`, `b`, `b without decay` or `embedding`, in the same tree."""

    def group(path: Any, x: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if re.search(r"embedding/(a|b)$", name):
            return "embedding"
        if x.ndim <= 1 or re.search(r"(^|[/_])bias$|(^|/)(scale|magnitude)$", name):
            return "b without decay"
        return "b" if re.search(r"(^|/)b$", name) else "a"

    return jax.tree_util.tree_map_with_path(group, trainable)


def _times(rate: Any, ratio: float) -> Any:
    if not callable(rate):
        return rate * ratio
    schedule: Callable[[Any], Any] = rate

    def times(count: Any) -> Any:
        return schedule(count) * ratio

    return times
