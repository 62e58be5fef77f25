"""Checkpoints: there and back to the bit, onto other shardings, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import CheckpointError, Checkpoints, fingerprint, make_mesh

MESH = make_mesh()
SPLIT, WHOLE = NamedSharding(MESH, P("fsdp")), NamedSharding(MESH, P())


@pytest.fixture
def state():
    return {
        "w": jax.device_put(jax.random.normal(jax.random.key(0), (16, 4)), SPLIT),
        "half": (jnp.arange(8, dtype=jnp.bfloat16) / 3, jnp.zeros((), jnp.int32)),
        "key": jax.random.key(5),
        "other": jax.random.split(jax.random.key(5, impl="rbg"), 3),
    }


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)


def test_there_and_back(tmp_path, state):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(3, state, {"data": {"epoch": 1}})
        saved.wait()
        got, about = saved.restore(state)
    same(got, state)
    assert about == {"data": {"epoch": 1}}
    assert got["w"].sharding == SPLIT
    jax.random.normal(got["other"][0])  # a key to draw from


def test_onto_another_sharding_and_from_shapes(tmp_path, state):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    like["w"] = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=WHOLE)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        saved.wait()
        got, _ = saved.restore(like)
    same(got, state)
    assert got["w"].sharding == WHOLE


def test_the_newest_few_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() is None
        for i in range(4):
            saved.save(i, state, i)
        saved.save(3, state, "again")  # there already
        saved.wait()
        assert saved.latest() == 3
        assert saved.restore(state)[1] == 3
        assert saved.restore(state, 2)[1] == 2
        with pytest.raises(CheckpointError, match="holds no checkpoint of step 1"):
            saved.restore(state, 1)


def test_nothing_there(tmp_path, state):
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(CheckpointError, match="holds no checkpoint$"),
    ):
        saved.restore(state)
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_another_state_is_refused_with_all_that_differs(tmp_path, state):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        saved.wait()
        like = {**state, "w": jnp.zeros((16, 5)), "new": jnp.zeros(2)}
        del like["key"]
        with pytest.raises(CheckpointError) as e:
            saved.restore(like)
    told = str(e.value)
    assert "missing: new" in told
    assert "unexpected: key" in told
    assert "w is float32[16, 4], not float32[16, 5]" in told


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 0 and "d" in path.parent.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_one_is_passed_over(tmp_path, state, caplog):
    with Checkpoints(tmp_path) as saved:
        for i in (1, 2):
            saved.save(i, state, i)
        saved.wait()
    truncate(tmp_path / "2")
    with Checkpoints(tmp_path) as saved, caplog.at_level(logging.WARNING, "sharding"):
        got, about = saved.restore(state)
        assert about == 1
        same(got, state)
        assert "2 cannot be read" in caplog.text
        with pytest.raises(CheckpointError, match="2 cannot be read"):
            saved.restore(state, 2)
    truncate(tmp_path / "1")
    with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match="cannot be read"):
        saved.restore(state)


def test_other_frozen_parameters_are_refused(tmp_path, state):
    base = {"w": jnp.arange(6.0).reshape(2, 3)}
    with Checkpoints(tmp_path, base=fingerprint(base)) as saved:
        saved.save(1, state)
        saved.wait()
        saved.restore(state)
    other = {"w": base["w"].at[0, 0].add(1e-6)}
    with (
        Checkpoints(tmp_path, base=fingerprint(other)) as saved,
        pytest.raises(CheckpointError, match="trained on other frozen parameters"),
    ):
        saved.restore(state)


def test_a_fingerprint_is_of_contents_not_of_places(state):
    name = fingerprint(state)
    assert fingerprint({**state, "w": jax.device_put(state["w"], WHOLE)}) == name
    swapped = state["w"].at[jnp.array([0, 1])].set(state["w"][jnp.array([1, 0])])
    for other in (
        {**state, "w": swapped},
        {**state, "w": state["w"].astype(jnp.bfloat16)},
        {**state, "w": state["w"].reshape(4, 16)},
        {**state, "key": jax.random.key(6)},
    ):
        assert fingerprint(other) != name
