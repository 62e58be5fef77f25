"""Parameters are gathered where they are read, a layer at a time, and not kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import make_mesh
from sharding.gather import Placed, gathered

LAYERS, WIDTH = 16, 128
MESH = make_mesh()


def on(*spec):
    return NamedSharding(MESH, P(*spec))


WEIGHTS = Placed(on(None, "fsdp"), on(), on(None, "fsdp"))
KEY = jax.random.key(0)
W = 0.1 * jax.random.normal(KEY, (LAYERS, WIDTH, WIDTH))
X = jax.random.normal(jax.random.key(1), (16, WIDTH))


def scanned(remat):
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    body = jax.checkpoint(layer) if remat else layer
    return lambda w, x: jnp.mean(jax.lax.scan(body, x, w)[0] ** 2)


def looped(w, x):
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ w[i])
    return jnp.mean(x**2)


def compiled(loss, placed=WEIGHTS):
    walked = gathered(loss, lambda w, x: [placed, None])
    spec = placed.gradient or placed.stored
    jitted = jax.jit(jax.value_and_grad(walked), out_shardings=(on(), spec))
    args = (jax.device_put(W, placed.stored), jax.device_put(X, on("fsdp")))
    return jitted.lower(*args).compile(), args


@pytest.mark.parametrize("loss", [scanned(True), scanned(False), looped], ids=["remat", "", "loop"])
def test_it_is_the_same_function(loss):
    program, args = compiled(loss)
    value, grads = program(*args)
    want, gradient = jax.value_and_grad(loss)(W, X)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grads, gradient, atol=1e-6)
    assert grads.sharding.spec == P(None, "fsdp")


@pytest.mark.parametrize("remat", [True, False])
def test_one_layer_at_a_time_is_whole(remat):
    """Without the walk's policy the backward pass would keep all layers, gathered."""
    program, _ = compiled(scanned(remat))
    layer = WIDTH * WIDTH * 4
    gradients = LAYERS * layer // 8
    kept = LAYERS * 3 * (16 // 8) * WIDTH * 4
    temporaries = program.memory_analysis().temp_size_in_bytes
    # Shards of the gradient and of the parameters, activations, and a few layers' buffers.
    assert temporaries < 2 * gradients + kept + 5 * layer < LAYERS * layer
    assert "all-gather" in program.as_text()


def test_integers_and_what_is_not_marked_are_left_alone():
    def loss(w, table, x):
        return jnp.sum(w[0] @ table["k"]) + jnp.sum(table["n"]) + jnp.sum(x)

    table = {"k": jnp.ones((WIDTH, 4)), "n": jnp.arange(3)}
    walked = gathered(loss, lambda *_: [WEIGHTS, None, None, None])
    value = jax.jit(walked)(jax.device_put(W, WEIGHTS.stored), table, X)
    np.testing.assert_allclose(value, loss(W, table, X), rtol=1e-4)


def test_a_narrower_type_is_gathered():
    """A cast goes before the gathering: half the bytes over the wires."""

    def loss(w, x):
        return jnp.mean((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)[0]).astype(jnp.float32))

    jaxpr = jax.make_jaxpr(gathered(loss, lambda w, x: [WEIGHTS, None]))(W, X)
    text = str(jaxpr)
    assert "sharding_constraint" in text
    before, _, _ = text.partition("sharding_constraint")
    assert "bf16[16,128,128] = convert_element_type" in before


def test_what_a_loop_carries_or_a_branch_reads_is_gathered_before():
    def loss(w, x):
        _, out = jax.lax.fori_loop(0, 2, lambda i, c: (c[0], c[1] @ c[0][i]), (w, x))
        return jnp.mean(jax.lax.cond(out[0, 0] > 0, lambda w: w[0], lambda w: w[1], w)) + out.mean()

    program, args = compiled(loss)
    np.testing.assert_allclose(program(*args)[0], loss(W, X), rtol=1e-4)
