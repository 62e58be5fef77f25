"""Two copies of the weights, and one that is rounded at random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
SMALL = [5.0**i for i in range(-20, 21)]


def stepped(params, new, dtype):
    """Parameters and masters after one step in which the masters jump to `new`."""
    jump = optax.stateless(lambda g, p: jax.tree.map(lambda g, m: g - m, g, p))
    optimiser = jpeft.master_weights(jump)
    updates, state = optimiser.update(new, optimiser.init(params), params)
    got = optax.apply_updates(params, updates)
    return got, state.masters, state.masters.astype(dtype)


@settings(max_examples=200, deadline=None)
@given(
    old=st.sampled_from([*SMALL, 0.0]),
    new=st.sampled_from([*SMALL, 0.0]),
    sign=st.sampled_from([-1, 1]),
    by=st.floats(0.5, 2),
)
def test_the_parameter_is_the_masters_rounding(old, new, sign, by):
    """From any number to any other in one step, through `optax.apply_updates`."""
    got, masters, want = stepped(
        jnp.asarray([old * by], BF16), jnp.asarray([sign * new], F32), BF16
    )
    assert got.dtype == BF16
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    # The master is where the optimiser put it, within what fp32 loses on the way there anyway.
    assert abs(float(masters[0]) - sign * np.float32(new)) <= 2.0**-22 * max(new, abs(old * by))


@pytest.mark.parametrize("dtype", [BF16, jnp.dtype("float16"), F32])
@pytest.mark.parametrize("compiled", [True, False])
def test_so_are_many_at_once(dtype, compiled):
    """Compiled too, where XLA may keep more digits than a type has."""
    draw = np.random.default_rng(0)
    low, high = (-20, 8) if dtype == np.float16 else (-90, 90)
    n = 50_000
    scale = draw.choice([1e-7, 1e-5, 1.0, 1.003, 2.0, 30.0], n)
    old = draw.normal(size=n) * 2.0 ** draw.integers(low, high, n)
    new = np.where(draw.random(n) < 0.5, old * scale, draw.permutation(old))
    args = jnp.asarray(old, dtype), jnp.asarray(new, F32)
    run = jax.jit(stepped, static_argnums=2) if compiled else stepped
    got, masters, want = run(*args, dtype)
    np.testing.assert_array_equal(got, want)
    away = np.abs(np.asarray(masters, np.float64) - new)
    assert np.all(away <= 2.0**-22 * np.maximum(np.abs(new), np.abs(old)))


def test_masters_go_where_fp32_goes():
    """Fifty steps of Adam, to the last bit, given the same gradients."""
    start = jax.random.normal(jax.random.key(0), (1000,)).astype(BF16)
    plain, mixed = optax.adam(1e-2), jpeft.master_weights(optax.adam(1e-2))
    whole, params = start.astype(F32), start
    one, two = plain.init(whole), mixed.init(params)
    for i in range(50):
        grads = jax.random.normal(jax.random.key(i), (1000,)).astype(BF16)
        updates, one = plain.update(grads.astype(F32), one, whole)
        whole = optax.apply_updates(whole, updates)
        updates, two = mixed.update(grads, two, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(two.masters, whole)
    np.testing.assert_array_equal(params, whole.astype(BF16))


def test_a_method_places_bf16_copies():
    base = {"w": jnp.full((4, 4), 2.0, BF16), "head": jnp.ones((4, 2), BF16)}
    method = jpeft.chain(jpeft.LoRA(2, 2.0, "w"), jpeft.Train("head"))
    trainable = jpeft.cast(method.init(jax.random.key(0), base), BF16)
    optimiser = jpeft.master_weights(optax.sgd(0.5))
    state = optimiser.init(trainable)

    def loss(trainable):
        forward = jpeft.lift(lambda p, x: x @ p["w"] @ p["head"])
        return jnp.sum(forward(method.rewrite(base, trainable), jnp.ones((1, 4), BF16)))

    grads = jax.grad(loss)(trainable)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {BF16}
    updates, state = optimiser.update(grads, state, trainable)
    new = optax.apply_updates(trainable, updates)
    read = method.rewrite(base, new)["head"]
    assert read.dtype == BF16
    np.testing.assert_array_equal(read, jnp.ones((4, 2), BF16) - 4)  # the gradient is 8 everywhere


def test_masters_and_moments_are_wide_and_gradients_are_cast():
    params = {"w": jnp.ones((3, 2), BF16), "norm": jnp.ones(2, F32)}
    optimiser = jpeft.master_weights(optax.adam(1e-3))
    state = optimiser.init(params)
    assert {x.dtype for x in jax.tree.leaves((state.masters, state.inner[0].mu))} == {F32}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = optimiser.update(grads, state, params)
    new = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda x: x.dtype, new) == {"w": BF16, "norm": F32}
    np.testing.assert_array_equal(new["norm"], state.masters["norm"])
    assert {x.dtype for x in jax.tree.leaves(state.inner[0].nu)} == {F32}


def test_frozen_parameters_have_no_master():
    base = {"w": jnp.ones((64, 64), BF16)}
    transform = jpeft.LoRA(rank=2, targets="w")
    trainable = jpeft.cast(transform.init(jax.random.key(0), base), BF16)
    state = jpeft.master_weights(optax.adam(1e-3)).init(trainable)
    own = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 * own + 1  # masters, mu, nu, a count
    assert own < base["w"].size


def test_random_rounding_is_right_in_the_mean():
    """An update of a tenth of the distance to the next number, a thousand times."""
    params = jnp.ones(20_000, BF16)
    step = 2.0**-7 / 10
    optimiser = jpeft.stochastic_rounding(optax.sgd(1.0), seed=0)
    state = optimiser.init(params)
    updates, state = optimiser.update(jnp.full(20_000, -step, F32), state, params)
    new = optax.apply_updates(params, updates).astype(F32)
    assert set(np.unique(new)) == {1.0, 1 + 2.0**-7}
    # The mean of 20,000 draws is within five of its standard deviations.
    deviation = 2.0**-7 * np.sqrt(0.1 * 0.9 / 20_000)
    assert abs(float(new.mean()) - (1 + step)) < 5 * deviation
    again, _ = optimiser.update(jnp.full(20_000, -step, F32), state, params)
    assert not np.array_equal(again, updates)  # another step draws anew


def test_random_rounding_keeps_what_is_not_finite_and_what_is_exact():
    params = jnp.asarray([1.0, 2.0, -3.5, 0.0], BF16)
    optimiser = jpeft.stochastic_rounding(optax.sgd(1.0), seed=0)
    grads = jnp.asarray([jnp.inf, jnp.nan, 0.0, 0.0], F32)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    new = optax.apply_updates(params, updates).astype(F32)
    assert new[0] == -jnp.inf
    assert jnp.isnan(new[1])
    assert new[2:].tolist() == [-3.5, 0.0]


def test_cast_and_policy():
    params = {"w": jnp.ones((2, 2)), "norm": {"scale": jnp.ones(2)}, "n": jnp.arange(2)}
    got = jpeft.cast(params, BF16, keep=r"norm/")
    assert jax.tree.map(lambda x: x.dtype.name, got) == {
        "w": "bfloat16",
        "norm": {"scale": "float32"},
        "n": "int32",
    }
    seen = []

    def apply(params, x):
        seen.append((params["w"].dtype, params["norm"]["scale"].dtype, x.dtype))
        return x @ params["w"]

    out = jpeft.Policy(keep="norm")(apply)(params, jnp.ones((1, 2)))
    assert seen == [(BF16, F32, BF16)]
    assert out.dtype == F32


@pytest.mark.parametrize("optimiser", [jpeft.master_weights, jpeft.stochastic_rounding])
def test_parameters_are_needed(optimiser):
    more = (0,) if optimiser is jpeft.stochastic_rounding else ()
    chain = optimiser(optax.sgd(1.0), *more)
    state = chain.init(jnp.ones(2, BF16))
    with pytest.raises(ValueError, match="pass the parameters"):
        chain.update(jnp.ones(2), state)


# -- what it is for: small steps are not lost ------------------------------------------------------


@functools.cache
def fine_tuned(kind):
    """The loss after 200 steps of Adam, and how many of the last updates changed their number."""
    keys = jax.random.split(jax.random.key(3), 4)
    start = {
        "up": jax.random.normal(keys[0], (32, 64)) / 6,
        "down": jax.random.normal(keys[1], (64, 32)) / 8,
    }
    moved = jax.tree.map(lambda w: w * 1.03 + 0.004, start)  # a little away from where it is
    x = jax.random.normal(keys[2], (128, 32))

    def forward(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    want = forward(moved, x) + 0.05 * jax.random.normal(keys[3], (128, 32))

    def loss(params):
        compute = jpeft.cast(params, F32)
        return jnp.mean((forward(compute, x) - want) ** 2)

    inner = optax.adam(3e-5)
    optimiser = {
        "float32": inner,
        "bfloat16": inner,
        "mixed": jpeft.master_weights(inner),
        "stochastic": jpeft.stochastic_rounding(inner, seed=1),
    }[kind]
    params = start if kind == "float32" else jpeft.cast(start, BF16)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        before = params
        params, state = step(params, state)
    masters = state.masters if kind == "mixed" else params
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)
    changed = sum(int((a != b).sum()) for a, b in pairs)
    total = sum(a.size for a in jax.tree.leaves(params))
    return float(loss(masters)), float(loss(params)), changed / total


def test_masters_reach_what_fp32_reaches_and_plain_bf16_stalls():
    whole, _, _ = fine_tuned("float32")
    mixed, rounded, _ = fine_tuned("mixed")
    plain, _, changed = fine_tuned("bfloat16")
    assert abs(mixed / whole - 1) < 0.01
    assert abs(rounded / whole - 1) < 0.01  # what the model reads
    assert plain > 1.2 * whole
    assert changed < 0.2  # most updates of plain bf16 are lost


def test_random_rounding_goes_on_where_plain_bf16_stalls():
    plain, random = fine_tuned("bfloat16")[0], fine_tuned("stochastic")[0]
    assert random < 0.9 * plain
