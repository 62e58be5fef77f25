"""Chains: their order, and the combinations that are refused."""

import copy

import jax
import jax.numpy as jnp
import pytest

import jpeft
from tests.core.drawn import drawn

PARAMS = {
    "embed": {"embedding": jnp.ones((9, 4))},
    "kernel": jnp.ones((4, 4)),
    "bias": jnp.zeros(4),
}
TABLE = r"embed/embedding$"
LOW = jpeft.LoRA(2, 4.0, r"^kernel$")


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((jpeft.PromptTuning(2, TABLE), jpeft.PromptTuning(3, TABLE)), "one longer prompt"),
        ((jpeft.PromptTuning(2, TABLE), jpeft.PrefixTuning(2, "bias$")), "give it after=2"),
        ((jpeft.PrefixTuning(2, "bias$"), jpeft.PromptTuning(2, TABLE)), "give it after=2"),
        ((jpeft.Subspace(4), jpeft.Subspace(9, "bias$")), "give one another seed"),
        ((jpeft.chain(jpeft.Subspace(4)), jpeft.Subspace(9)), "another seed"),
    ],
)
def test_refused_when_built(pair, reason):
    with pytest.raises(jpeft.TargetError, match=reason):
        jpeft.chain(*pair)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ((jpeft.Adapter(2, r"^kernel$"), LOW), "'kernel' already has Adapted.*put LoRA before it"),
        ((jpeft.PromptTuning(2, TABLE), jpeft.LoRA(2, 4.0, TABLE)), "put LoRA before it"),
        ((jpeft.Adapter(2, r"^kernel$"), jpeft.IA3(r"^kernel$")), "put IA3 before it"),
        ((LOW, jpeft.Train(".*")), "put Train before the method"),
        ((LOW, jpeft.Subspace(5)), "put Subspace before the method"),
        (
            (jpeft.PrefixTuning(3, "bias$"), jpeft.PrefixTuning(2, "bias$", after=2)),
            "already has a prefix at positions 0 to 3",
        ),
        (
            (jpeft.Train("bias$"), jpeft.Train("^bias")),
            r"'bias' is trained by Train.*bias\$.*, and Train\(targets='\^bias'.* over it",
        ),
        ((jpeft.Train("kernel", last=1), jpeft.Train("kernel")), "'kernel' is trained by Train"),
        ((jpeft.Subspace(5), jpeft.Train("bias")), r"'bias' is trained by Subspace\(d=5"),
        ((jpeft.houlsby(2, "kernel", "bias"), jpeft.bitfit()), "'bias' is trained by Chain"),
        ((jpeft.Train("bias"), jpeft.houlsby(2, "kernel", "bias")), "Chain.*would write over it"),
    ],
)
def test_refused_on_a_model(pair, reason):
    with pytest.raises(jpeft.TargetError, match=reason):
        jpeft.chain(*pair).init(jax.random.key(0), PARAMS)


@pytest.mark.parametrize(
    "pair",
    [
        (jpeft.Train("kernel"), LOW),
        (jpeft.Train("bias"), jpeft.Adapter(2, "bias$")),
        (jpeft.Train("bias"), jpeft.Subspace(5)),
        (jpeft.Subspace(5, "bias|kernel"), LOW),
        (jpeft.Subspace(5, "kernel"), jpeft.Train("bias")),
    ],
    ids=str,
)
def test_what_stands_on_a_trained_parameter_trains_both(pair):
    method = jpeft.chain(*pair)
    state = drawn(method, PARAMS)

    def apply(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"])

    def loss(state):
        return jpeft.lift(apply)(method.rewrite(PARAMS, state), jnp.eye(4)).sum()

    grads = jax.tree.leaves(jax.grad(loss)(state))
    assert all(jnp.abs(g).max() > 0 for g in grads)


def test_two_prefixes_side_by_side():
    method = jpeft.chain(jpeft.PrefixTuning(2, "bias$"), jpeft.PrefixTuning(2, "bias$", after=2))
    state = method.init(jax.random.key(0), PARAMS)
    state = jax.tree.map(lambda x, y: x * 0 + y, state, ({"bias": state[0]["bias"]}, state[1]))
    out = jpeft.lift(lambda p: jnp.zeros((1, 5, 4)) + p["bias"])(method.rewrite(PARAMS, state))
    assert (out[0, :2] == state[0]["bias"].values).all()
    assert (out[0, 2:4] == state[1]["bias"].values).all()
    assert not out[0, 4].any()


@pytest.mark.parametrize(
    "method",
    [
        jpeft.Train(["bias$"]),
        jpeft.Subspace(4, ["bias$"]),
        jpeft.PromptTuning(2, [TABLE]),
        jpeft.chain(jpeft.Train(["bias$"]), jpeft.LoRA(2, 4.0, ["kernel"])),
    ],
    ids=str,
)
def test_a_list_of_targets_hashes(method):
    assert hash(method) == hash(copy.deepcopy(method))


def test_the_last_layers_of_what_is_no_stack_are_refused():
    params = {"layers": {"scale": jnp.ones((3, 4))}, "final": {"scale": jnp.ones(4)}}
    with pytest.raises(jpeft.TargetError, match=r"not one stack: .*'layers/scale' \(3, 4\)"):
        jpeft.Train("scale", last=1).init(jax.random.key(0), params)


def test_what_is_no_transform(unchecked):
    with pytest.raises(TypeError, match="takes transforms, got 'lora'"):
        jpeft.chain("lora")


def test_a_state_of_other_parameters_is_refused():
    state = LOW.init(jax.random.key(0), PARAMS)
    with pytest.raises(jpeft.TargetError, match="'kernel', which these parameters do not have"):
        LOW.rewrite({"other": jnp.ones((4, 4))}, state)
    with pytest.raises(jpeft.TargetError, match="1 transforms, the chain has 2"):
        jpeft.chain(LOW, jpeft.Train("bias$")).rewrite(PARAMS, (state,))
