"""Many tasks in one batch: what is refused, and models' own arrangements of a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

W = jax.random.normal(jax.random.key(1), (2, 6, 6)) * 0.4
PARAMS = {"w": W, "b": jnp.ones((2, 6))}
X = jax.random.normal(jax.random.key(3), (3, 4, 6))
TASK = jnp.array([1, 0, -1])
LORA = jpeft.LoRA(2, 4.0, "w$", axes={"w": "bio"})
ADAPTER = jpeft.Adapter(2, "b$", axes={"b": "bo"})
DORA = jpeft.LoRA(2, 4.0, "w$", axes={"w": "bio"}, dora=True)


def states(method, params=PARAMS):
    state = method.init(jax.random.key(0), params)
    leaves, tree = jax.tree.flatten(state)
    return [
        tree.unflatten([x + jax.random.normal(jax.random.key(k), x.shape) for x in leaves])
        for k in (1, 2)
    ]


def indexed(params, x):
    for i in range(2):
        x = jnp.tanh(x @ params["w"][i] + params["b"][i])
    return x


def scanned(params, x):
    def step(x, layer):
        return jnp.tanh(x @ layer["w"] + layer["b"]), None

    return jax.lax.scan(step, x, params)[0]


def cut(params, x):
    for i in range(2):
        layer = {k: jax.lax.dynamic_slice_in_dim(v, i, 1) for k, v in params.items()}
        x = jnp.tanh(x @ layer["w"].reshape(6, 6) + layer["b"].reshape(6))
    return x


def cast(params, x):
    half = {k: v.astype(jnp.float32) for k, v in params.items()}
    return scanned(half, x)


@pytest.mark.parametrize("apply", [indexed, scanned, cut, cast])
@pytest.mark.parametrize(
    "method",
    [
        LORA,
        ADAPTER,
        jpeft.chain(LORA, ADAPTER),
        jpeft.chain(jpeft.Train("."), LORA, ADAPTER),
        jpeft.chain(jpeft.Subspace(4), DORA),
    ],
)
def test_stacked_layers(apply, method):
    @jax.jit
    def run(states):
        alone = [jpeft.lift(apply)(method.rewrite(PARAMS, s), X) for s in states]
        rewritten = method.rewrite(PARAMS, jpeft.stack(states), task=TASK)
        return alone, jpeft.lift(apply)(rewritten, X)

    alone, out = run(states(method))
    np.testing.assert_allclose(out[0], alone[1][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[1], alone[0][1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[2], apply(PARAMS, X)[2], rtol=1e-4, atol=1e-4)


def test_convolutions_and_kernels_on_the_left():
    params = {"conv": jax.random.normal(jax.random.key(0), (3, 2, 4)), "w": W[0]}
    x = jax.random.normal(jax.random.key(1), (3, 5, 2))

    def apply(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        y = jnp.concatenate([y, y[..., :2]], axis=-1)
        return jnp.einsum("io,bti->obt", params["w"], y)

    method = jpeft.LoRA(1, 2.0, ("conv", "w"))
    uses = jpeft.uses(apply, params, x)
    state = method.init(jax.random.key(0), params, uses=uses)
    two = [jax.tree.map(lambda x, k=k: x + k, state) for k in (0.3, -0.5)]

    @jax.jit
    def run(two):
        alone = [jpeft.lift(apply)(method.rewrite(params, s), x) for s in two]
        return alone, jpeft.lift(apply)(method.rewrite(params, jpeft.stack(two), task=TASK), x)

    alone, out = run(two)
    want = [alone[1][:, 0], alone[0][:, 1], apply(params, x)[:, 2]]
    np.testing.assert_allclose(out, jnp.stack(want, axis=1), rtol=1e-4, atol=1e-4)


def test_dropout_differs_between_examples():
    method = jpeft.LoRA(2, 4.0, "w$", dropout=0.5)
    params = {"w": W[0]}
    same = jnp.broadcast_to(X[:1], X.shape)
    stacked = jpeft.stack(states(method, params))
    forward = jpeft.lift(lambda p, x: x @ p["w"])
    task = jnp.zeros(3, int)
    plain = forward(method.rewrite(params, stacked, task=task), same)
    np.testing.assert_allclose(plain[0], plain[1], rtol=1e-5)
    out = forward(method.rewrite(params, stacked, task=task, key=jax.random.key(1)), same)
    assert not np.allclose(out[0], out[1])


def test_what_is_refused(unchecked):
    params = {"w": W[0]}
    method = jpeft.LoRA(2, 4.0, "w$")
    stacked = jpeft.stack(states(method, params))
    with pytest.raises(jpeft.TargetError, match="vector of integers"):
        method.rewrite(params, stacked, task=jnp.zeros((2, 2), int))
    with pytest.raises(jpeft.TargetError, match="made by jpeft.stack"):
        method.rewrite(params, states(method, params)[0], task=TASK)
    with pytest.raises(ValueError, match="at least one"):
        jpeft.stack([])
    other = jpeft.LoRA(3, 4.0, "w$").init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="state 1 is of another transform .* 'w/a', 'w/b'"):
        jpeft.stack([states(method, params)[0], other])
    rewritten = method.rewrite(params, stacked, task=TASK)
    with pytest.raises(jpeft.LeafError, match=r"meets an array of shape \(2, 6\).*3 task ids"):
        jpeft.lift(lambda p, x: x @ p["w"])(rewritten, jnp.ones((2, 6)))
    with pytest.raises(jpeft.LeafError, match="no axis counts the examples"):
        jpeft.lift(lambda p: jnp.sin(p["w"]))(rewritten)
    with pytest.raises(jpeft.LeafError, match="acts where it is used"):
        jpeft.merge(rewritten)
