"""Adapters: the papers' formulas, sizes and starts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.models.bert import Bert, BertConfig
from tests.core.drawn import drawn

W = jax.random.normal(jax.random.key(1), (6, 8)) * 0.4
PARAMS = {"kernel": W, "bias": jnp.arange(8.0) / 8}
X = jax.random.normal(jax.random.key(3), (4, 6))


def apply(params, x):
    return x @ params["kernel"] + params["bias"]


def filled(state, seed=2):
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("target", ["bias$", "kernel$"])
def test_the_sequential_formula(target):
    method = jpeft.Adapter(3, target)
    state = filled(method.init(jax.random.key(0), PARAMS))
    (b,) = state.values()
    out = jpeft.lift(apply)(method.rewrite(PARAMS, state), X)
    h = apply(PARAMS, X) if target == "bias$" else X @ W
    want = h + jax.nn.gelu(h @ b.down + b.down_bias) @ b.up + b.up_bias
    want = want if target == "bias$" else want + PARAMS["bias"]
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_the_parallel_formula():
    method = jpeft.parallel_adapter(3, "kernel$")
    state = filled(method.init(jax.random.key(0), PARAMS))
    b = state["kernel"]
    out = jpeft.lift(apply)(method.rewrite(PARAMS, state), X)
    beside = jax.nn.relu(X @ b.down + b.down_bias) @ b.up + b.up_bias
    np.testing.assert_allclose(out, apply(PARAMS, X) + 4 * beside, rtol=1e-5, atol=1e-5)


def test_the_start_is_a_truncated_normal():
    b = jpeft.Adapter(64, "kernel$").init(jax.random.key(0), {"kernel": jnp.zeros((256, 256))})
    b = b["kernel"]
    for x in (b.down, b.up):
        assert float(jnp.abs(x).max()) <= 2e-3
        assert float(x.std()) == pytest.approx(0.88e-3, rel=0.03)  # of one cut at two deviations
    assert not b.down_bias.any()
    assert not b.up_bias.any()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_outputs_of_several_axes(heads, width, size, transposed, seed):
    normal = np.random.default_rng(seed).standard_normal
    params = {"kernel": normal((5, heads, width)), "bias": normal((heads, width))}
    params, x = jax.tree.map(np.float32, (params, normal((2, 3, 5))))

    def several(params, x):
        w = params["kernel"]
        y = jnp.einsum("bti,ihw->bthw", x, w)
        if transposed:
            y = jnp.einsum("ihw,bti->bthw", w, x)
        return y + params["bias"]

    for target in ("bias$", "kernel$"):
        method = jpeft.Adapter(size, target)
        uses = jpeft.uses(several, params, x)

        state = drawn(method, params, seed, uses=uses)

        @jax.jit
        def run(params, state, x, method=method):
            return jpeft.lift(several)(method.rewrite(params, state), x)

        out = run(params, state, x)
        (b,) = state.values()
        h = np.einsum("bti,ihw->bthw", x, params["kernel"])
        h = h + params["bias"] if target == "bias$" else h
        flat = h.reshape(2, 3, -1)
        flat = flat + gelu(flat @ b.down + b.down_bias) @ b.up + b.up_bias
        want = flat.reshape(h.shape) + (0 if target == "bias$" else params["bias"])
        np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-3)


def gelu(x):
    """As `jax.nn.gelu`, by NumPy."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_an_adapter_for_each_expert():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 5, 4))}
    x = jax.random.normal(jax.random.key(1), (3, 2, 7, 5))

    def experts(params, x):
        return jnp.einsum("ebti,eio->ebto", x, params["kernel"])

    method = jpeft.Adapter(2, "kernel$")
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(experts, params, x))
    state = filled(state)
    out = jpeft.lift(experts)(method.rewrite(params, state), x)
    for e in range(3):
        b = jax.tree.map(lambda x, e=e: x[e], state["kernel"])
        h = x[e] @ params["kernel"][e]
        want = h + jax.nn.gelu(h @ b.down + b.down_bias) @ b.up + b.up_bias
        np.testing.assert_allclose(out[e], want, rtol=1e-3, atol=1e-3)


def houlsby_share(size):
    """Trained numbers over those of BERT-large's layers."""
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )

    def shapes():
        from flax import nnx

        return jpeft.functional(Bert(config, rngs=nnx.Rngs(0), pooler=False)).params

    params = jax.eval_shape(shapes)
    axes = {r"bias$": "bo"}
    method = jpeft.chain(
        jpeft.Train(r"LayerNorm/"), jpeft.Adapter(size, r"output/dense/bias$", axes=axes)
    )
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), params)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
    adapters = 24 * 2 * (2 * size * 1024 + size + 1024)  # 2md + d + m, twice a layer
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(state[1])) == adapters
    return count / sum(math.prod(x.shape) for x in jax.tree.leaves(params["encoder"]))


def test_houlsbys_share_of_bert_large():
    # Section 3.3: size 64 trains 2.1% of the parameters of a task.
    assert round(100 * houlsby_share(64), 1) == 2.1
    assert 100 * houlsby_share(8) < 0.4
    assert 8 < 100 * houlsby_share(256) < 8.5


def test_errors(unchecked):
    with pytest.raises(ValueError, match="size must be at least 1"):
        jpeft.Adapter(0)
    with pytest.raises(ValueError, match="'sequential' or 'parallel', got 'beside'"):
        jpeft.Adapter(4, "bias$", "beside")
    with pytest.raises(ValueError, match="activation is one of"):
        jpeft.Adapter(4, "bias$", activation="swish")
    with pytest.raises(jpeft.TargetError, match=r"beside a kernel, but 'bias' is a bias"):
        jpeft.parallel_adapter(4, "bias$").init(jax.random.key(0), PARAMS)
    stacked = {"layers": {"bias": jnp.zeros((3, 8))}}
    with pytest.raises(jpeft.TargetError, match="is it stacked"):
        jpeft.Adapter(4, "bias$").init(jax.random.key(0), stacked)
    method = jpeft.Adapter(4, "kernel$")
    rewritten = method.rewrite(PARAMS, method.init(jax.random.key(0), PARAMS))
    with pytest.raises(jpeft.LeafError, match="Adapted at 'kernel' cannot be read by .* 'sin'"):
        jpeft.lift(lambda p: jnp.sin(p["kernel"]))(rewritten)
    with pytest.raises(jpeft.LeafError, match="Adapted at 'kernel'"):
        jpeft.lift(lambda p, x: x @ p["kernel"].T)(rewritten, jnp.ones((2, 8)))


def convolved(params, x):
    layout = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=layout)


@pytest.mark.parametrize("window", [1, 3])
def test_an_adapter_on_a_convolution_acts_on_the_channels_that_come_out(window):
    params = {"kernel": jax.random.normal(jax.random.key(1), (window, 4, 4))}
    x = jax.random.normal(jax.random.key(2), (2, 5, 4))
    uses = jpeft.uses(convolved, params, x)

    def run(method):
        state = filled(method.init(jax.random.key(0), params, uses=uses))
        return state["kernel"], jpeft.lift(convolved)(method.rewrite(params, state), x)

    b, got = run(jpeft.Adapter(3, "kernel$"))
    h = convolved(params, x)
    want = h + jax.nn.gelu(h @ b.down + b.down_bias) @ b.up + b.up_bias
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(jpeft.LeafError, match="parallel adapter at 'kernel' .*by a convolution"):
        run(jpeft.parallel_adapter(3, "kernel$"))


def test_layers_that_a_method_did_not_know_of():
    params = {"kernel": jnp.ones((3, 4, 4))}

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["kernel"])[0]

    method = jpeft.Adapter(2, "kernel$", axes={"kernel": "ioo"})
    rewritten = method.rewrite(params, method.init(jax.random.key(0), params))
    with pytest.raises(jpeft.LeafError, match=r"'kernel' is stacked over 3 layers.*uses=jpeft"):
        jpeft.lift(apply)(rewritten, jnp.ones((2, 4)))
