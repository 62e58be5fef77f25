"""Where each stage puts parameters, gradients and optimiser state."""

import math
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jpeft.models.llama import AXES
from sharding import Zero, axes_by_pattern, make_mesh

TREE = {
    "embed": jax.ShapeDtypeStruct((512, 64), jnp.float32),
    "layers": {
        "kernel": jax.ShapeDtypeStruct((4, 64, 128), jnp.float32),
        "scale": jax.ShapeDtypeStruct((4, 64), jnp.float32),
    },
}


def axes(path, shape):
    return {
        "embed": ("vocab", "embed"),
        "layers/kernel": ("layers", "embed", "mlp"),
    }.get(path)


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


def bytes_on_one(tree, shardings):
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_shards_one_kind_more(stage):
    zero = Zero(make_mesh(), stage, smallest=1)
    whole = bytes_on_one(TREE, jax.tree.map(lambda _: zero.replicated, TREE))
    state = jax.eval_shape(optax.adam(1e-3).init, TREE)
    assert bytes_on_one(TREE, zero.parameters(TREE)) == (whole / 8 if stage == 3 else whole)
    assert bytes_on_one(TREE, zero.gradients(TREE)) == (whole / 8 if stage >= 2 else whole)
    moments = bytes_on_one(state, zero.optimiser(state, TREE))
    assert moments == 4 + 2 * (whole / 8 if stage >= 1 else whole)  # Adam counts its steps: int32


def test_axes_of_layers_are_never_split():
    zero = Zero(make_mesh("fsdp=4,data=2"), smallest=1)
    assert specs(zero.parameters(TREE)) == {
        "embed": P("fsdp"),
        "layers": {"kernel": P(None, None, "fsdp"), "scale": P(None, "fsdp")},
    }
    named = specs(zero.parameters(TREE, axes))
    assert named["layers"]["kernel"] == P(None, "fsdp")


def test_small_leaves_stay_whole():
    zero = Zero(make_mesh(), smallest=65)
    assert specs(zero.parameters(TREE))["layers"]["scale"] == P()


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("encoder/layer/q", (1024, 1024), P(None, "fsdp")),
        ("encoder/layer/q", (1024, 4099), P("fsdp")),
        ("block/out", (1024, 32769), P("fsdp")),
        ("wte", (50257, 768), P(None, "fsdp")),
        ("layers/scale", (32, 4096), P()),
        ("layers/kernel", (4, 1024, 1024), P(None, "fsdp")),
    ],
)
def test_one_large_block_is_split_whatever_it_is_called(path, shape, spec):
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
    zero = Zero(make_mesh())
    assert specs(zero.parameters(tree)) == {path: spec}
    state = jax.eval_shape(optax.adam(1e-3).init, tree)
    assert specs(zero.optimiser(state, tree)[0].mu) == {path: spec}


def test_what_is_large_and_stays_whole_is_told_once():
    tree = {"wte": jax.ShapeDtypeStruct((50257, 769), jnp.float32), **TREE}
    for stage, told in ((0, 0), (1, 1), (3, 1)):
        zero = Zero(make_mesh(), stage)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            for of in (zero.parameters, zero.gradients, zero.reduced, zero.reduced):
                of(tree)
        assert len(found) == told
        assert all(str(w.message).endswith("evenly: 'wte' (50257, 769)") for w in found)


def test_tensor_parallelism_by_names_at_every_stage():
    mesh = make_mesh("fsdp=4,tensor=2")
    for stage in (0, 3):
        got = specs(Zero(mesh, stage, smallest=1).parameters(TREE, axes))
        assert got["embed"] == (P(("tensor", "fsdp")) if stage == 3 else P("tensor"))
        kernel = got["layers"]["kernel"]
        assert kernel == (P(None, "fsdp", "tensor") if stage == 3 else P(None, None, "tensor"))


def test_a_rule_names_the_axis_that_is_sharded():
    zero = Zero(make_mesh(), rules={"mlp": "fsdp"}, smallest=1)
    assert specs(zero.parameters(TREE, axes))["layers"]["kernel"] == P(None, None, "fsdp")


def test_moments_and_masters_follow_their_parameter():
    zero = Zero(make_mesh(), 1, smallest=1)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimiser.init, TREE)
    got = zero.optimiser(state, TREE, axes)
    own = zero.reduced(TREE, axes)
    adam = got[1][0]
    assert adam.mu == own
    assert adam.nu == own
    assert adam.count == zero.replicated


def test_factored_moments_are_sharded_by_size():
    zero = Zero(make_mesh(), 1, smallest=1)
    tree = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
    state = jax.eval_shape(optax.adafactor(1e-3).init, tree)
    got = zero.optimiser(state, tree)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(got), strict=True):
        assert s.spec == (P("fsdp") if x.size >= 256 else P())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), max_size=4),
    layers=st.booleans(),
    stage=st.integers(0, 3),
    named=st.booleans(),
)
def test_any_leaf_can_be_placed(shape, layers, stage, named):
    mesh = make_mesh("fsdp=4,tensor=2")
    path = {"layers": {"x": jax.ShapeDtypeStruct(tuple(shape), jnp.float32)}}
    names = (["layers"] if layers else []) + ["mlp", "embed", "heads", "x"]
    table = (lambda _, s: tuple(names[: len(s)])) if named else None
    (sharding,) = jax.tree.leaves(Zero(mesh, stage, smallest=1).parameters(path, table))
    sharding.shard_shape(tuple(shape))  # raises where an axis is not divided evenly
    small = math.prod(shape) < 2**20
    if sharding.spec and (layers if named else small) and len(shape) > 1:
        assert sharding.spec[0] is None


def test_batches():
    zero = Zero(make_mesh("data=2,fsdp=2,tensor=2"))
    batch = {"ids": jnp.zeros((8, 5)), "count": jnp.zeros(())}
    assert specs(zero.batch(batch)) == {"ids": P(("data", "fsdp")), "count": P()}
    with pytest.raises(ValueError, match="'ids' of the batch has 6 rows, which 4 devices"):
        zero.batch({"ids": jnp.zeros((6, 5))})


def test_wrong_settings_are_refused():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="got 4"):
        Zero(mesh, 4)
    with pytest.raises(ValueError, match="mlp -> model"):
        Zero(mesh, rules={"mlp": "model"})
    with pytest.raises(ValueError, match="no axis 'fsdp'"):
        Zero(jax.make_mesh((8,), ("x",)))
    with pytest.raises(ValueError, match="'embed' has shape"):
        Zero(mesh).parameters(TREE, lambda path, shape: ("embed",))


def test_names_of_our_models():
    named = axes_by_pattern(AXES)
    assert named("model/layers/mlp/up_proj/kernel", (4, 64, 128)) == ("layers", "embed", "mlp")
    assert named("model/layers/mlp/up_proj/kernel/a", (4, 64, 8)) is None
