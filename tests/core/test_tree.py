"""Paths and patterns, `uses`, `summary`, `chain`."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jpeft
from jpeft.paths import flatten, match, replace

PARAMS = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "b": [jnp.ones((4, 2)), None]}
names = st.text("abcxyz_0", min_size=1, max_size=4)
trees = st.recursive(
    st.builds(lambda n: jnp.zeros(n), st.integers(1, 3)),
    lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda t: isinstance(t, dict))


@given(trees)
def test_replacing_every_path_by_itself_changes_nothing(tree):
    leaves = flatten(tree)
    assert len(leaves) == len(jax.tree.leaves(tree))
    again = replace(tree, leaves)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True))


@given(trees, st.data())
def test_a_path_as_a_whole_pattern_matches_itself(tree, data):
    leaves = flatten(tree)
    path = data.draw(st.sampled_from(sorted(leaves)))
    assert path in match(f"^{path}$", leaves)


class Projections(eqx.Module):
    query: jax.Array
    value: jax.Array


def test_a_field_called_value_keeps_its_name():
    params = {"attn": Projections(jnp.ones((3, 3)), jnp.ones((3, 3)))}
    assert list(flatten(params)) == ["attn/query", "attn/value"]
    state = jpeft.LoRA(1, 1.0, r"(query|value)$").init(jax.random.key(0), params)
    assert set(state) == {"attn/query", "attn/value"}


def test_the_value_of_a_flax_variable_has_no_name():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(module)
    assert set(flatten(module)) == set(flatten(state)) == set(flatten(nnx.to_pure_dict(state)))
    assert list(flatten({"kernel": nn.Partitioned(jnp.ones(3), (None,))})) == ["kernel"]
    assert replace(state, {"bias": jnp.ones(3)})["bias"][...].all()
    kept = jpeft.cast(state, jnp.bfloat16, keep="bias$")
    assert {p: x.dtype for p, x in flatten(kept).items()} == {
        "bias": jnp.float32,
        "kernel": jnp.bfloat16,
    }


def test_two_parameters_with_one_path_are_told():
    with pytest.raises(jpeft.TargetError, match="two parameters have the path 'a/b'"):
        flatten({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})


def test_a_module_with_functions_in_it_is_read_without_them():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = jnp.ones((5, 3))

    def apply(mlp, x):
        return jax.vmap(mlp)(x)

    found = jpeft.uses(apply, mlp, x)
    assert (
        set(found)
        == set(flatten(mlp))
        == {f"layers/{i}/{n}" for i in (0, 1) for n in ("weight", "bias")}
    )
    for method in (jpeft.LoRA(1, 1.0, "weight$"), jpeft.Train(".*"), jpeft.Subspace(3)):
        assert jpeft.summary(method, mlp, uses=found).trainable > 0
        state = method.init(jax.random.key(0), mlp, uses=found)
        out = jpeft.lift(apply)(method.rewrite(mlp, state), x)
        assert jnp.allclose(out, apply(mlp, x))


def test_every_pattern_must_match():
    with pytest.raises(jpeft.TargetError, match=r"'nope' matches no parameter"):
        match(["kernel$", "nope"], flatten(PARAMS))
    with pytest.raises(jpeft.TargetError, match=r"not a regular expression|unterminated"):
        match("(", flatten(PARAMS))


def test_a_near_miss_is_suggested():
    with pytest.raises(jpeft.TargetError, match=r"a/kernel"):
        match("a/kernal$", flatten(PARAMS))


def test_summary_counts():
    method = jpeft.chain(jpeft.LoRA(2, 4.0, "kernel$"), jpeft.Train("bias$"))
    found = jpeft.summary(method, PARAMS)
    assert [(r.path, r.method, r.trainable) for r in found.rows] == [
        ("a/kernel", "LoRA", 14),
        ("a/bias", "Train", 4),
    ]
    assert found.trainable == 18
    assert found.total == 12 + 4 + 8 + 14
    assert "trainable params: 18 || all params: 38 || trainable%: 47.3684" in str(found)


def test_summary_allocates_nothing():
    huge = {"kernel": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    assert jpeft.summary(jpeft.LoRA(8, 8.0, "kernel$"), huge).trainable == 16 * 10**6


def test_uses_tell_inputs_from_outputs():
    params = {"w": jnp.ones((3, 2, 4)), "t": jnp.ones((9, 3))}

    def apply(params, ids):
        return jnp.einsum("bi,ihw->bhw", params["t"][ids], params["w"])

    found = jpeft.uses(apply, params, jnp.array([1, 2]))
    state = jpeft.LoRA(2, 4.0, "w$|t$").init(jax.random.key(0), params, uses=found)
    assert state["w"].axes == "ioo"
    assert state["w"].a.shape == (3, 2)
    assert state["w"].b.shape == (2, 2, 4)
    assert not state["t"].a.any()  # a table: A is the one at zero


def test_an_unused_parameter_is_told():
    params = {"used": jnp.ones((3, 4)), "idle": jnp.ones((3, 4))}
    found = jpeft.uses(lambda p, x: x @ p["used"], params, jnp.ones((2, 3)))
    with pytest.raises(jpeft.TargetError, match="idle"):
        jpeft.LoRA(2, 4.0, "idle$").init(jax.random.key(0), params, uses=found)


def test_kernels_picked_from_their_stack_are_no_table():
    params = {"w": jnp.ones((3, 4, 4))}
    found = jpeft.uses(lambda p, x: x @ jnp.take(p["w"], 1, axis=0), params, jnp.ones((2, 4)))
    with pytest.raises(jpeft.TargetError, match="'w' is looked up in.*'bio' for a stack"):
        jpeft.LoRA(1, 1.0, "w").init(jax.random.key(0), params, uses=found)


def test_a_kernel_that_is_read_otherwise_is_told_of_axes():
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}

    def apply(params, x):
        return sum(x @ half for half in jnp.split(params["kernel"], 2, axis=1)) + params["bias"][:2]

    found = jpeft.uses(apply, params, jnp.ones((2, 3)))
    with pytest.raises(jpeft.TargetError, match="read by split: .*give LoRA axes={pattern: lett"):
        jpeft.LoRA(1, 1.0, "kernel").init(jax.random.key(0), params, uses=found)
    method = jpeft.LoRA(1, 1.0, "kernel", axes={"kernel": "io"})
    assert method.init(jax.random.key(0), params, uses=found)["kernel"].axes == "io"
    with pytest.raises(jpeft.TargetError, match="read by add: make the pattern end in"):
        jpeft.LoRA(1, 1.0, "bias").init(jax.random.key(0), params, uses=found)


def test_chain_takes_transforms_alone():
    with pytest.raises(TypeError, match="kernel"):
        jpeft.chain(jpeft.Train("kernel"), "kernel")


def test_training_what_is_already_rewritten_is_refused():
    method = jpeft.chain(jpeft.LoRA(2, 4.0, "kernel$"), jpeft.Train("kernel$"))
    with pytest.raises(jpeft.TargetError, match="'a/kernel' was already rewritten"):
        method.init(jax.random.key(0), PARAMS)
