"""Random subspaces: the projections, their norms and gradients, DID and SAID."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as dense_hadamard
from scipy.stats import kstest

import jpeft
from jpeft.subspace import _fastfood, _normal, hadamard

PARAMS = {
    "embed": {"embedding": jnp.ones((11, 6))},
    "layers": {"kernel": jnp.ones((3, 6, 6)), "bias": jnp.zeros((3, 6))},
    "head": {"kernel": jnp.ones((6, 2)), "bias": jnp.zeros(2)},
    "count": jnp.array(3),
}
PROJECTIONS = ("fastfood", "dense", "sparse")


@given(st.integers(0, 9), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_fast_transform_is_hadamards_matrix(power, seed):
    x = np.random.default_rng(seed).standard_normal((2, 2**power)).astype(np.float32)
    want = x @ dense_hadamard(2**power)
    np.testing.assert_allclose(jax.jit(hadamard)(x), want, rtol=1e-4, atol=1e-3)


def test_fastfood_is_its_dense_matrix():
    d, sizes = 6, {"a": 21, "b": 5, "c": 16}
    key = jax.random.key(4)
    signs, order, gauss = jax.random.split(key, 3)
    b = jax.random.rademacher(signs, (8,), jnp.float32)
    g = _normal(jax.random.bits(gauss, (), jnp.uint32), jnp.arange(6, dtype=jnp.uint32), 8)
    pi = jax.random.permutation(order, jnp.eye(8))
    h = jnp.asarray(dense_hadamard(8), jnp.float32)
    blocks = []
    for i in range(6):
        matrix = h @ jnp.diag(g[i]) @ pi @ h @ jnp.diag(b)
        blocks.append(matrix / jnp.sqrt(8 * jnp.sum(g[i] ** 2)) * jnp.sqrt(8))
    # Every parameter has blocks of its own, the last of which is cut.
    rows = jnp.concatenate(blocks)[:, :d]
    dense = jnp.concatenate([rows[:21], rows[24:29], rows[32:48]])

    def whole(theta):
        return jnp.concatenate(list(_fastfood(key, theta, sizes).values()))

    draw = np.random.default_rng(5).standard_normal
    theta, cotangent = np.float32(draw(d)), np.float32(draw(42))

    @jax.jit
    def both(theta, cotangent):
        out, pull = jax.vjp(whole, theta)
        return out, pull(cotangent)[0]

    out, grad = both(theta, cotangent)
    np.testing.assert_allclose(out, dense @ theta, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad, dense.T @ cotangent, rtol=1e-4, atol=1e-4)


def test_a_large_parameters_blocks_are_no_constant_of_the_program():
    theta, sizes = jnp.ones(4), {"large": 2**22, "small": 5, "other": 6}
    lowered = jax.jit(lambda x: _fastfood(jax.random.key(0), x, sizes)).lower(theta)
    assert len(lowered.as_text()) < 100_000  # a million numbers of blocks would be four megabytes


def test_the_gaussians_are_normal_and_independent():
    def drawn(key, first=0, rows=512):
        bits = jax.random.bits(jax.random.key(key), (), jnp.uint32)
        return np.asarray(
            _normal(bits, jnp.arange(first, first + rows, dtype=jnp.uint32), 1024), np.float64
        )

    g = drawn(3)
    assert kstest(g.ravel(), "norm").pvalue > 0.001
    assert abs(g.mean()) < 0.005
    assert np.abs(np.corrcoef(g[:64])[np.triu_indices(64, 1)]).max() < 0.16  # 5 deviations
    for shift in (1, 2, 7, 1024):
        flat = g.ravel()
        assert abs(np.corrcoef(flat[:-shift], flat[shift:])[0, 1]) < 0.007
    np.testing.assert_array_equal(drawn(3, 500, 12), g[500:])
    assert abs(np.corrcoef(g.ravel(), drawn(4).ravel())[0, 1]) < 0.007
    assert abs(np.corrcoef(g.ravel(), drawn(3, 512).ravel())[0, 1]) < 0.007


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_columns_have_unit_norm_in_expectation(projection):
    params = {"a": jnp.zeros((60, 50)), "b": jnp.zeros((1000,))}
    method = jpeft.Subspace(64, projection=projection)

    def moved(theta):
        state = {"subspace": jpeft.Coordinates(theta, None)}
        return jnp.concatenate([x.ravel() for x in method.rewrite(params, state).values()])

    p = jax.jit(jax.jacfwd(moved))(jnp.zeros(64))
    norms = jnp.linalg.norm(p, axis=0)
    assert 0.97 < float(norms.mean()) < 1.03
    gram = p.T @ p - jnp.diag(norms**2)
    assert float(jnp.abs(gram).max()) < 0.15  # near orthogonal


def test_did_has_no_scales_and_said_one_a_layer():
    layer = jpeft.Subspace(40, scales="layer").init(jax.random.key(0), PARAMS)["subspace"]
    assert layer.scales.shape == (5,)  # embed, three stacked layers, head
    assert layer.theta.shape == (35,)
    tensor = jpeft.Subspace(40, scales="tensor").init(jax.random.key(0), PARAMS)["subspace"]
    assert tensor.scales.shape == (1 + 3 + 3 + 2,)
    did = jpeft.Subspace(40).init(jax.random.key(0), PARAMS)["subspace"]
    assert (did.theta.shape, did.scales) == ((40,), None)
    assert jpeft.summary(jpeft.Subspace(40, scales="layer"), PARAMS).trainable == 40


def test_a_numbered_layer_is_one_layer():
    params = {
        f"layers_{i}": {"kernel": jnp.ones((4, 4)), "norm": {"scale": jnp.ones(4)}} for i in (0, 1)
    }
    state = jpeft.Subspace(9, scales="layer").init(jax.random.key(0), params)["subspace"]
    assert state.scales.shape == (2,)


def test_a_scale_moves_its_layer_alone():
    method = jpeft.Subspace(40, scales="layer")
    rewrite = jax.jit(method.rewrite)
    state = method.init(jax.random.key(0), PARAMS)["subspace"]
    theta = jax.random.normal(jax.random.key(1), state.theta.shape)
    one = rewrite(PARAMS, {"subspace": jpeft.Coordinates(theta, state.scales)})
    doubled = jpeft.Coordinates(theta, state.scales.at[2].set(2.0))
    two = rewrite(PARAMS, {"subspace": doubled})
    changed = [
        (path, i)
        for path in ("kernel", "bias")
        for i in range(3)
        if not np.array_equal(one["layers"][path][i], two["layers"][path][i])
    ]
    assert len({i for _, i in changed}) == 1
    assert len(changed) == 2
    i = changed[0][1]
    base = PARAMS["layers"]["kernel"][i]
    np.testing.assert_allclose(
        two["layers"]["kernel"][i] - base, 2 * (one["layers"]["kernel"][i] - base), atol=1e-5
    )
    np.testing.assert_array_equal(one["head"]["kernel"], two["head"]["kernel"])


def test_integers_stay_and_a_pattern_restricts():
    method = jpeft.Subspace(4, r"^head/")
    state = {"subspace": jpeft.Coordinates(jnp.ones(4), None)}
    moved = method.rewrite(PARAMS, state)
    assert int(moved["count"]) == 3
    np.testing.assert_array_equal(moved["embed"]["embedding"], PARAMS["embed"]["embedding"])
    assert not np.array_equal(moved["head"]["kernel"], PARAMS["head"]["kernel"])


def test_nothing_of_p_is_an_argument_or_a_constant():
    params = {"w": jnp.zeros((512, 512))}
    method = jpeft.Subspace(1000)

    def loss(theta, params):
        state = {"subspace": jpeft.Coordinates(theta, None)}
        return jnp.sum(method.rewrite(params, state)["w"] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(1000), params).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes <= 4 * (512 * 512 + 1000)
    # A stored P would be 1000 times the parameters; what is there is a few times theirs.
    assert memory.temp_size_in_bytes < 12 * 4 * 512 * 512
    assert memory.generated_code_size_in_bytes < 4 * 512 * 512


def test_the_seed_is_ps():
    state = {"subspace": jpeft.Coordinates(jnp.ones(8), None)}
    one, again, other = (
        jpeft.Subspace(8, r"kernel$", seed=s).rewrite(PARAMS, state)["head"]["kernel"]
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_errors():
    with pytest.raises(ValueError, match="at least 1 dimension, got 0"):
        jpeft.Subspace(0)
    with pytest.raises(jpeft.TargetError, match="200 dimensions is larger than the 14 parameters"):
        jpeft.Subspace(200, "^head/").init(jax.random.key(0), PARAMS)
    with pytest.raises(jpeft.TargetError, match="d=5 leaves nothing beside the 5 scales"):
        jpeft.Subspace(5, scales="layer").init(jax.random.key(0), PARAMS)
    state = jpeft.Subspace(9).init(jax.random.key(0), PARAMS)
    with pytest.raises(jpeft.TargetError, match="has 9 coordinates and 0 scales"):
        jpeft.Subspace(9, scales="layer").rewrite(PARAMS, state)
