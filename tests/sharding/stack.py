"""A step of stacked layers, compiled for devices that are not there, and what theory says of it."""

import jax
import jax.numpy as jnp
import optax

from sharding import Zero, make_mesh, make_step
from sharding.aot import compile_for, placed

LAYERS, WIDTH, ROWS = 4, 256, 64


def loss(trainable, frozen, batch, key):
    """Of a frozen product and layers that are made again in the backward pass."""

    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    x = jax.lax.scan(jax.checkpoint(layer), batch @ frozen, trainable["layers"])[0]
    return jnp.mean(x.astype(jnp.float32) ** 2)


def axes(path, shape):
    """The names of the layers' axes."""
    return ("layers", "in", "out") if path == "layers" else None


def compiled(stage, devices, options, rows=ROWS, optimiser=None):
    """The step's report, in bf16, with all devices on `fsdp`."""
    zero = Zero(make_mesh(None, devices), stage, smallest=1)
    step = make_step(loss, optimiser or optax.adam(1e-3), zero=zero, axes=axes)
    state = step.abstract({"layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16)})
    frozen = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)
    batch = jax.ShapeDtypeStruct((rows, WIDTH), jnp.bfloat16)
    frozen, batch = placed(frozen, zero.parameters(frozen)), placed(batch, zero.batch(batch))
    return compile_for(step, state, frozen, batch, options=options)


def moved(report):
    """The elements of layers' weights in each kind of collective, in parameters."""
    weights = LAYERS * WIDTH * WIDTH
    large = [c for c in report.collectives if c.elements >= WIDTH * WIDTH]
    return {
        kind: sum(c.times * c.elements for c in large if c.kind == kind) / weights
        for kind in {c.kind for c in large}
    }
