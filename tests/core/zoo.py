"""One small encoder, written five times: what every method is tried on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jpeft

VOCABULARY, WIDTH, HEADS, CLASSES = 11, 8, 2, 3
IDS = jax.random.randint(jax.random.key(1), (3, 5), 0, VOCABULARY)
INNER = ("query", "key", "value", "out", "up", "down")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """`apply(params, ids)` gives `(b, classes)`, read off the last token."""

    apply: Callable[..., Any]
    params: Any
    uses: Any


def attend(q, k, v):
    """Softmax attention, `(..., t, width)`, in two heads."""
    q, k, v = (x.reshape(*x.shape[:-1], HEADS, -1) for x in (q, k, v))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k)
    mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:-2], -1)


def block(dense, x):
    """Attention and an MLP; `dense(name, x)` is a layer."""
    mixed = attend(dense("query", x), dense("key", x), dense("value", x))
    x = x + dense("out", mixed)
    return x + dense("down", jnp.tanh(dense("up", x)))


def sizes(name):
    """Inputs and outputs of a layer."""
    return {"up": (WIDTH, 6), "down": (6, WIDTH), "head": (WIDTH, CLASSES)}.get(
        name, (WIDTH, WIDTH)
    )


def _plain_layer(key, name, *stack):
    n_in, n_out = sizes(name)
    kernel, bias = jax.random.split(key)
    return {
        "kernel": jax.random.normal(kernel, (*stack, n_in, n_out)) * n_in**-0.5,
        "bias": 0.1 * jax.random.normal(bias, (*stack, n_out)),
    }


def _plain_params(*stack):
    keys = jax.random.split(jax.random.key(0), 8)
    inner = {n: _plain_layer(k, n, *stack) for n, k in zip(INNER, keys, strict=False)}
    return {
        "embed": {"embedding": jax.random.normal(keys[6], (VOCABULARY, WIDTH))},
        "layers": inner,
        "head": _plain_layer(keys[7], "head"),
    }


def _dense(layers):
    return lambda name, x: x @ layers[name]["kernel"] + layers[name]["bias"]


def plain():
    """A function of nested dictionaries."""

    def apply(params, ids):
        x = block(_dense(params["layers"]), params["embed"]["embedding"][ids])
        return _dense(params)("head", x[..., -1, :])

    return apply, _plain_params()


def scanned():
    """The same, with two stacked layers, scanned and rematerialised."""

    def apply(params, ids):
        @jax.checkpoint
        def step(x, layer):
            return block(_dense(layer), x), None

        x, _ = jax.lax.scan(step, params["embed"]["embedding"][ids], params["layers"])
        return _dense(params)("head", x[..., -1, :])

    return apply, _plain_params(2)


class LinenEncoder(nn.Module):
    """In Linen."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(ids)
        x = block(lambda name, x: nn.Dense(sizes(name)[1], name=name)(x), x)
        return nn.Dense(CLASSES, name="head")(x[..., -1, :])


def linen():
    """In Linen."""
    module = LinenEncoder()
    params = module.init(jax.random.key(0), IDS)
    return module.apply, params


class NnxEncoder(nnx.Module):
    """In NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        for name in (*INNER, "head"):
            setattr(self, name, nnx.Linear(*sizes(name), rngs=rngs))

    def __call__(self, ids):
        # nnx.Embed computes in the type that it was made with; here it follows its parameter.
        x = self.embed(ids).astype(self.embed.embedding.dtype)
        x = block(lambda name, x: getattr(self, name)(x), x)
        return self.head(x[..., -1, :])


def from_nnx():
    """In NNX."""
    return jpeft.functional(NnxEncoder(nnx.Rngs(0)))


class EqxEncoder(eqx.Module):
    """In Equinox, whose modules see one example and whose weights are (out, in)."""

    embed: eqx.nn.Embedding
    inner: dict[str, eqx.nn.Linear]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 8)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.inner = {
            n: eqx.nn.Linear(*sizes(n), key=k) for n, k in zip(INNER, keys[1:7], strict=True)
        }
        self.head = eqx.nn.Linear(*sizes("head"), key=keys[7])

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        x = block(lambda name, x: jax.vmap(self.inner[name])(x), x)
        return self.head(x[-1])


def equinox():
    """In Equinox."""
    params, static = eqx.partition(EqxEncoder(jax.random.key(0)), eqx.is_inexact_array)

    def apply(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    return apply, params


MAKERS = {"plain": plain, "scanned": scanned, "linen": linen, "nnx": from_nnx, "equinox": equinox}


def make(name: str) -> Model:
    """A model of the zoo."""
    apply, params = MAKERS[name]()
    # Parameters well away from zero: freshly made biases would hide what acts on them.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = tree.unflatten(noisy)
    return Model(apply, params, jpeft.uses(apply, params, IDS))
