"""LoRA on Linen, NNX, Equinox and plain functions, none of them touched."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft

IDS = jnp.array([[1, 4, 2, 0, 3], [2, 2, 5, 1, 0]])
IMAGE = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


class LinenText(nn.Module):
    """An embedding, attention, scanned and remat layers, a head."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8)(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(8, name="inner")(x)), None

        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(4, name="head")(x)


class LinenImage(nn.Module):
    """Two convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        return nn.Conv(4, (3, 3), strides=2)(x).mean((1, 2))


class NnxText(nnx.Module):
    """The same as Linen's, with `nnx.scan`."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = stacked(rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return self.head(run(x, self.layers))


class NnxImage(nnx.Module):
    """Two convolutions."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.second = nnx.Conv(6, 4, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x))).mean((1, 2))


def linen(module, x):
    params = module.init(jax.random.key(0), x)
    return module.apply, params, (x,)


def from_nnx(module, x):
    apply, params = jpeft.functional(module)
    return apply, params, (x,)


def equinox():
    model = eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return apply, params, (jax.random.normal(jax.random.key(2), (4, 5)),)


def plain():
    params = {
        "in": jax.random.normal(jax.random.key(0), (5, 2, 4)) * 0.3,
        "out": jax.random.normal(jax.random.key(1), (2, 4, 3)) * 0.3,
    }

    def apply(params, x):
        h = jnp.tanh(jnp.einsum("bi,ihw->bhw", x, params["in"]))
        return jnp.einsum("bhw,hwo->bo", h, params["out"])

    return apply, params, (jax.random.normal(jax.random.key(2), (4, 5)),)


MODELS = {
    "linen text": (lambda: linen(LinenText(), IDS), r"(kernel|embedding)$"),
    "linen image": (lambda: linen(LinenImage(), IMAGE), r"kernel$"),
    "nnx text": (lambda: from_nnx(NnxText(nnx.Rngs(0)), IDS), r"(kernel|embedding)$"),
    "nnx image": (lambda: from_nnx(NnxImage(nnx.Rngs(0)), IMAGE), r"kernel$"),
    "equinox": (equinox, r"weight$"),
    "plain": (plain, r"in|out"),
}


def moved(state):
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten(
        [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@functools.cache
def made(name):
    """The model, what it reads, and LoRA on it, at its start."""
    make, pattern = MODELS[name]
    apply, params, inputs = make()
    method = jpeft.LoRA(2, 4.0, pattern)
    uses = jpeft.uses(apply, params, *inputs)
    start = jax.jit(lambda params: method.init(jax.random.key(0), params, uses=uses))
    return jax.jit(apply), params, inputs, method, start(params)


@pytest.fixture(params=MODELS)
def case(request):
    return made(request.param)


def test_starts_at_the_model(case):
    apply, params, inputs, method, state = case
    out = jax.jit(jpeft.lift(apply))(method.rewrite(params, state), *inputs)
    np.testing.assert_allclose(out, apply(params, *inputs), atol=1e-5)


def test_equals_merged_weights(case):
    apply, params, inputs, method, state = case
    rewritten = method.rewrite(params, moved(state))
    out = jpeft.lift(apply)(rewritten, *inputs)
    assert float(jnp.abs(out - apply(params, *inputs)).max()) > 0.01
    merged = jax.jit(jpeft.merge)(rewritten)
    np.testing.assert_allclose(out, apply(merged, *inputs), atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_dense_formula(case):
    apply, params, inputs, method, state = case
    state = moved(state)

    def lifted(state):
        return jnp.sum(jpeft.lift(apply)(method.rewrite(params, state), *inputs) ** 2)

    def dense(state):
        return jnp.sum(apply(jpeft.merge(method.rewrite(params, state)), *inputs) ** 2)

    ours, want = jax.jit(jax.grad(lifted))(state), jax.jit(jax.grad(dense))(state)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_unmerge_gives_the_base_again(case):
    _, params, _, method, state = case
    state = moved(state)
    merged = jpeft.merge(method.rewrite(params, state))
    back = method.unmerge(merged, state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dropout_streams_and_mutable_collections_go_on_working():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            return nn.Dropout(0.5, deterministic=False)(x)

    x = jax.random.normal(jax.random.key(0), (4, 6))
    variables = Net().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    method = jpeft.LoRA(2, 4.0, r"kernel$")
    state = moved(method.init(jax.random.key(0), variables["params"]))

    def apply(params, x):
        rest = {k: v for k, v in variables.items() if k != "params"}
        rngs = {"dropout": jax.random.key(3)}
        return Net().apply({"params": params, **rest}, x, rngs=rngs, mutable=["batch_stats"])

    rewritten = method.rewrite(variables["params"], state)
    out, changed = jpeft.lift(apply)(rewritten, x)
    want, stats = apply(jpeft.merge(rewritten), x)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(jnp.abs(jax.tree.leaves(stats)[0]).max()) > 0


def test_nnx_dropout_through_rngs():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(6, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    apply, params, rest = jpeft.stateful(Net(nnx.Rngs(0)))
    method = jpeft.LoRA(2, 4.0, r"kernel$")
    rewritten = method.rewrite(params, moved(method.init(jax.random.key(0), params)))
    x = jnp.ones((4, 6))
    first, after = jpeft.lift(apply)(rewritten, rest, x)
    want, _ = apply(jpeft.merge(rewritten), rest, x)
    np.testing.assert_allclose(first, want, atol=1e-5)
    second, _ = jpeft.lift(apply)(rewritten, after, x)
    assert not np.array_equal(first, second)  # the stream moved on
