"""Normalisation and activations: values, derivatives of every kind, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from jpeft.models.layers import ACTIVATIONS, gated, gelu, gelu_tanh, silu
from jpeft.models.norms import LayerNorm, RMSNorm

X = jnp.asarray(np.random.default_rng(0).normal(1.0, 3.0, (2, 5, 16)), jnp.float32)
THEIRS = {
    "layer": lambda: nnx.LayerNorm(16, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)),
    "rms": lambda: nnx.RMSNorm(16, epsilon=1e-5, rngs=nnx.Rngs(0)),
}
OURS = {
    "layer": lambda dtype=jnp.float32: LayerNorm(16, 1e-5, dtype, dtype),
    "rms": lambda dtype=jnp.float32: RMSNorm(16, 1e-5, dtype, dtype),
}
CURVES = {
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_tanh": (gelu_tanh, jax.nn.gelu),
    "silu": (silu, jax.nn.silu),
}


def alike(mine, theirs, x):
    """Values, both kinds of derivative, and second ones."""
    t = jnp.cos(7 * x)
    for a, b in zip(jax.jvp(mine, (x,), (t,)), jax.jvp(theirs, (x,), (t,)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    of = [lambda x, f=f: jnp.sum(f(x) * t) for f in (mine, theirs)]
    np.testing.assert_allclose(*(jax.grad(f)(x) for f in of), atol=2e-5)
    twice = [jax.grad(lambda x, f=f: jnp.sum(jax.grad(f)(x) ** 2))(x) for f in of]
    assert float(jnp.abs(twice[1]).max()) > 1e-3
    np.testing.assert_allclose(*twice, atol=2e-4)


@pytest.mark.parametrize("kind", THEIRS)
def test_it_is_flaxs_norm(kind):
    mine, theirs = OURS[kind](), THEIRS[kind]()
    for name, value in {"scale": np.linspace(0.5, 2, 16), "bias": np.linspace(-1, 1, 16)}.items():
        if hasattr(mine, name):
            for norm in (mine, theirs):
                setattr(norm, name, nnx.Param(jnp.asarray(value, jnp.float32)))
    alike(mine, theirs, X)


@pytest.mark.parametrize("name", CURVES)
def test_it_is_jaxs_activation(name):
    alike(*CURVES[name], jnp.linspace(-6, 6, 101))


@pytest.mark.parametrize("name", CURVES)
def test_in_bf16_an_activation_is_fp32s_rounded_once(name):
    mine, theirs = CURVES[name]
    x = jnp.linspace(-6, 6, 101).astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    want = jax.vmap(jax.value_and_grad(theirs))(wide)
    for a, b in zip(jax.vmap(jax.value_and_grad(mine))(x), want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "f", [OURS["layer"], OURS["rms"], *(lambda f=f: f for f, _ in CURVES.values())]
)
def test_one_array_of_the_inputs_size_is_kept(f, capsys):
    f = f()
    print_saved_residuals(lambda x: jnp.sum(f(x) * 2), X)
    kept = [line for line in capsys.readouterr().out.splitlines() if "[2,5,16]" in line]
    assert len([line for line in kept if "from the argument" not in line]) == 1


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "relu"])
def test_a_gate_is_the_activation_times_the_rest(name):
    gate, up = X, jnp.cos(5 * X)

    def both(f):
        (y, t), pull = (
            jax.jvp(f, (gate, up), (jnp.sin(gate), up)),
            jax.grad(lambda *xs: jnp.sum(f(*xs) ** 2), (0, 1))(gate, up),
        )
        return y, t, *pull

    mine, theirs = both(gated(name)), both(lambda g, u: ACTIVATIONS[name](g) * u)
    for a, b in zip(mine, theirs, strict=True):
        assert float(jnp.abs(b).max()) > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_a_gate_keeps_two_arrays(capsys):
    def f(x):
        return jnp.sum(gated("silu")(3 * x, 5 * x) * 2)

    print_saved_residuals(f, X)
    kept = [line for line in capsys.readouterr().out.splitlines() if "[2,5,16]" in line]
    assert len([line for line in kept if "from the argument" not in line]) == 2


def test_far_from_zero_no_digits_are_lost():
    x = X + 4000
    wide = np.asarray(x, np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(OURS["layer"]()(x), want, atol=2e-3)


@pytest.mark.parametrize("kind", OURS)
def test_bf16(kind):
    half, full = OURS[kind](jnp.bfloat16), OURS[kind]()
    x = jnp.asarray(X, jnp.bfloat16)
    assert half(x).dtype == jnp.bfloat16
    grads = [
        jax.grad(lambda x, f=f: jnp.sum(f(x).astype(jnp.float32) ** 3))(y)
        for f, y in ((half, x), (full, x.astype(jnp.float32)))
    ]
    scale = float(jnp.abs(grads[1]).max())
    np.testing.assert_allclose(grads[0].astype(np.float32), grads[1], atol=0.03 * scale)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA for CPUs fuses")
def test_made_again_gelu_writes_down_no_error_function():
    x, into, back = jnp.ones((512, 64)), jnp.ones((64, 1024)), jnp.ones((1024, 64))
    keep = jax.checkpoint_policies.dots_saveable
    mlp = jax.checkpoint(lambda *given: gelu(given[0] @ given[1]) @ given[2], policy=keep)
    graded = jax.jit(
        jax.grad(lambda *given: jnp.sum(jnp.sin(mlp(*given))), argnums=(0, 1, 2)),
        compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
    )
    found = graded.lower(x, into, back).compile().memory_analysis()
    # Its input, its value and what goes back through it; the error function would be a fourth.
    assert found.temp_size_in_bytes < 3.5 * 4 * 512 * 1024
