"""The baseline of every comparison: a linear head on the frozen encoder's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.common.pipeline import Shapes, in_order
from experiments.common.tokens import Example
from experiments.common.training import INPUTS, compiler_options, loss_of


def frozen_head(
    model: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    shapes: Shapes,
    pad: int,
    seed: int,
    steps: int = 1000,
) -> np.ndarray:
    """Outputs on `validation`, `(n, classes)`, of a linear head trained on `train`.

    The features are computed once; the head is trained on all of them at every step, by Adam.
    """
    graphdef, state = nnx.split(model)
    features = jax.jit(
        lambda s, *inputs: nnx.merge(graphdef, s).features(*inputs),
        compiler_options=compiler_options(),
    )
    longest = max(len(e.ids) for e in (*train, *validation))
    wide = Shapes(shapes.batch, tuple(sorted({*shapes.lengths, longest})))

    def of(examples: Sequence[Example]) -> np.ndarray:
        out = np.zeros((len(examples), model.config.hidden_size), np.float32)
        for numbers, batch in in_order(examples, wide, pad):
            values = features(state, *(batch[k] for k in INPUTS))
            out[numbers] = np.asarray(values)[: len(numbers)]
        return out

    x, y = of(train), np.array([e.label for e in train], np.float32)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    optimiser = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=1e-2)
    outputs = max(1, model.num_labels)
    head = (
        jax.random.normal(jax.random.key(seed), (x.shape[1], outputs)) * 0.02,
        jnp.zeros(outputs),
    )

    def loss(head: Any, x: Any, y: Any) -> Any:
        total, count = loss_of(x @ head[0] + head[1], y, jnp.ones_like(y))
        return total / count

    @jax.jit
    def fit(head: Any, x: Any, y: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            head, moments = carry
            grads = jax.grad(loss)(head, x, y)
            updates, moments = optimiser.update(grads, moments, head)
            return (optax.apply_updates(head, updates), moments), None

        return jax.lax.scan(step, (head, optimiser.init(head)), None, steps)[0][0]

    w, b = fit(head, jnp.asarray((x - mean) / scale), jnp.asarray(y))
    return np.asarray((of(validation) - mean) / scale @ w + b)
