"""Models in fp64: no method rounds them at its start."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

METHODS = {
    "lora": jpeft.LoRA(2, 4.0, "w$"),
    "dora": jpeft.LoRA(2, 4.0, "w$", dora=True),
    "dylora": jpeft.DyLoRA(2, 4.0, "w$"),
    "ia3": jpeft.IA3("w$"),
    "train": jpeft.Train("w$"),
    "subspace": jpeft.Subspace(3),
}


@pytest.fixture(autouse=True)
def fp64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", METHODS)
def test_the_start_is_the_model_to_the_last_bit(name):
    method, params = METHODS[name], {"w": jax.random.normal(jax.random.key(1), (6, 8))}
    assert params["w"].dtype == jnp.float64
    rewritten = method.rewrite(params, method.init(jax.random.key(0), params))
    np.testing.assert_array_equal(jpeft.merge(rewritten)["w"], params["w"])
    x = jax.random.normal(jax.random.key(2), (4, 6))
    got = jpeft.lift(lambda p, x: x @ p["w"])(rewritten, x)
    np.testing.assert_array_equal(got, x @ params["w"])
    assert got.dtype == jnp.float64


def test_unmerging_loses_no_more_than_the_sum_did():
    method, params = METHODS["lora"], {"w": jax.random.normal(jax.random.key(1), (6, 8))}
    state = jax.tree.map(lambda x: x + 0.5, method.init(jax.random.key(0), params))
    back = method.unmerge(jpeft.merge(method.rewrite(params, state)), state)
    np.testing.assert_allclose(back["w"], params["w"], rtol=0, atol=1e-14)
