"""What every method must do: identity, training, merging, saving; under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

W = jax.random.normal(jax.random.key(1), (6, 8)) * 0.4
PARAMS = {
    "one": {"kernel": W, "bias": jnp.arange(8.0) / 8},
    "two": {"kernel": W.T, "bias": jnp.arange(6.0) / 6},
}
X = jax.random.normal(jax.random.key(3), (4, 6))
KERNELS = r"kernel$"
METHODS = {
    "lora": jpeft.LoRA(2, 4.0, KERNELS),
    "rslora": jpeft.LoRA(2, 4.0, KERNELS, rslora=True),
    "dora": jpeft.LoRA(2, 4.0, KERNELS, dora=True),
    "parts": jpeft.LoRA(2, 4.0, r"one/kernel$", parts={"one": (2, (1,))}),
    "train": jpeft.Train(KERNELS),
    "ia3": jpeft.IA3(r"one/kernel$", r"two/kernel$"),
    "bitfit": jpeft.bitfit(),
    "lora over ia3": jpeft.chain(jpeft.IA3(r"kernel$"), jpeft.LoRA(2, 4.0, KERNELS)),
    "ia3 over lora": jpeft.chain(jpeft.LoRA(2, 4.0, KERNELS), jpeft.IA3(r"kernel$")),
    "did": jpeft.Subspace(20),
    "said": jpeft.Subspace(20, scales="layer"),
    "said by tensor": jpeft.Subspace(20, KERNELS, scales="tensor", projection="dense"),
    "sparse subspace": jpeft.Subspace(20, projection="sparse"),
    "lora and biases": jpeft.chain(jpeft.LoRA(2, 4.0, KERNELS), jpeft.Train(r"bias$")),
    "lora twice": jpeft.chain(jpeft.LoRA(2, 4.0, KERNELS), jpeft.LoRA(1, 4.0, r"two/kernel$")),
}
each = pytest.mark.parametrize("name", METHODS)


def apply(params, x):
    h = jnp.tanh(x @ params["one"]["kernel"] + params["one"]["bias"])
    return h @ params["two"]["kernel"] + params["two"]["bias"]


def trained(method, params=PARAMS, scale=0.3):
    """A state away from the start, as after training."""
    state = method.init(jax.random.key(0), params)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten([x + scale * n for x, n in zip(leaves, noise, strict=True)])


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@each
def test_starts_at_the_model(name, key):
    method = METHODS[name]
    rewritten = method.rewrite(PARAMS, method.init(key, PARAMS))
    close(jpeft.lift(apply)(rewritten, X), apply(PARAMS, X))


@each
def test_a_trained_state_changes_the_output_and_merges(name):
    method = METHODS[name]
    rewritten = method.rewrite(PARAMS, trained(method))
    out = jpeft.lift(apply)(rewritten, X)
    assert float(jnp.abs(out - apply(PARAMS, X)).max()) > 0.05
    close(out, apply(jpeft.merge(rewritten), X))


@each
def test_gradients_are_those_of_merged_weights(name):
    method = METHODS[name]
    state = trained(method)

    def loss(state, forward):
        return jnp.sum(forward(method.rewrite(PARAMS, state)) ** 2)

    lifted = jax.grad(lambda s: loss(s, lambda p: jpeft.lift(apply)(p, X)))(state)
    dense = jax.grad(lambda s: loss(s, lambda p: apply(jpeft.merge(p), X)))(state)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(lifted))
    close(lifted, dense, 1e-4)


@each
def test_only_its_own_arrays_move(name):
    import optax

    method = METHODS[name]
    state = trained(method)
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def step(state, moments):
        grads = jax.grad(lambda s: jnp.sum(jpeft.lift(apply)(method.rewrite(PARAMS, s), X) ** 2))(
            state
        )
        updates, moments = optimiser.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments

    before = jax.tree.map(np.array, PARAMS)
    new, _ = step(state, optimiser.init(state))
    for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(old, now)
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(old, now)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(new))


@each
def test_saves_and_loads_bit_for_bit(name, tmp_path):
    method = METHODS[name]
    state = trained(method)
    jpeft.save(tmp_path / "state.safetensors", state)
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(5), PARAMS))
    found = jpeft.load(tmp_path / "state.safetensors", shapes)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@each
def test_bf16_model_with_fp32_state(name):
    method = METHODS[name]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = trained(method, half)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    out = jpeft.lift(apply)(method.rewrite(half, state), X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    full = jpeft.lift(apply)(method.rewrite(PARAMS, state), X)
    start = apply(PARAMS, X)
    # DoRA and Train take what they start from the model: compare at the bf16 model's precision.
    assert float(jnp.abs(out.astype(jnp.float32) - full).max()) < 0.1 + 0.05 * float(
        jnp.abs(start).max()
    )


def in_jit(p, x):
    return jax.jit(apply)(p, x)


def in_scan(p, x):
    return jax.lax.scan(lambda h, _: (apply(p, h), None), x, length=2)[0]


def in_remat(p, x):
    return jax.checkpoint(apply)(p, x)


def in_vmap(p, x):
    return jax.vmap(apply, (None, 0))(p, x)


@each
@pytest.mark.parametrize("model", [in_jit, in_scan, in_remat, in_vmap])
def test_inside_every_transformation(name, model):
    method = METHODS[name]
    rewritten = method.rewrite(PARAMS, trained(method))
    close(jpeft.lift(model)(rewritten, X), model(jpeft.merge(rewritten), X), 1e-4)


@each
def test_outside_every_transformation(name):
    method = METHODS[name]
    state = trained(method)

    def forward(state, x):
        return jpeft.lift(apply)(method.rewrite(PARAMS, state), x)

    plain = forward(state, X)
    close(jax.jit(forward)(state, X), plain)
    close(jax.checkpoint(forward)(state, X), plain)
    close(jax.vmap(forward, (None, 0))(state, X), plain)
    # Many states at once, one example each.
    states = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), state)
    two = jax.vmap(forward)(states, X[:2])
    doubled = jax.tree.map(lambda x: 2 * x, state)
    close(two[0], forward(state, X[0]))
    close(two[1], forward(doubled, X[1]))


def test_load_tells_what_differs(tmp_path):
    small, large = METHODS["lora"], jpeft.LoRA(3, 4.0, KERNELS)
    path = tmp_path / "state.safetensors"
    jpeft.save(path, trained(small), {"note": "rank 2"})
    with pytest.raises(ValueError, match=r"misshapen: one/kernel/a is \(6, 2\), not \(6, 3\)"):
        jpeft.load(path, trained(large))
    with pytest.raises(ValueError, match=r"unexpected: one/kernel/a"):
        jpeft.load(path, trained(jpeft.LoRA(2, 4.0, r"two/kernel$")))
    with pytest.raises(ValueError, match="no such file"):
        jpeft.load(tmp_path / "absent", trained(small))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        jpeft.load(path, trained(small))


def test_a_state_of_other_parameters_is_refused():
    state = trained(METHODS["lora"])
    with pytest.raises(jpeft.TargetError, match="one/kernel"):
        METHODS["lora"].rewrite({"other": {"kernel": W}}, state)
    with pytest.raises(jpeft.TargetError, match="1 transforms, the chain has 2"):
        METHODS["lora twice"].rewrite(PARAMS, (state,))
