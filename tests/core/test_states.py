"""Trained states that do not belong to the parameters or the transform that they are given to."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
from tests.core.drawn import drawn

PARAMS = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
OTHER = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
STACKED = {"kernel": jnp.ones((3, 6, 4)), "bias": jnp.zeros((3, 4))}
LOW = jpeft.LoRA(2, 8.0, "kernel")
METHODS = {
    "lora": LOW,
    "dora": jpeft.LoRA(2, 8.0, "kernel", dora=True),
    "dylora": jpeft.DyLoRA(2, 8.0, "kernel"),
    "train": jpeft.Train("kernel"),
    "last": jpeft.Train("kernel", last=2),
    "ia3": jpeft.IA3("kernel"),
    "adapter": jpeft.Adapter(2, "kernel"),
    "prefix": jpeft.PrefixTuning(2, "bias"),
    "prompt": jpeft.PromptTuning(2, "kernel", "uniform"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_state_of_another_model(method):
    state = drawn(method, PARAMS)
    jax.eval_shape(method.rewrite, PARAMS, state)
    with pytest.raises(jpeft.TargetError, match=r"at '(kernel|bias)' is of another transform or m"):
        jax.eval_shape(method.rewrite, OTHER, state)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lora", jpeft.IA3("kernel")),
        ("train", LOW),
        ("ia3", jpeft.Train("kernel")),
        ("adapter", jpeft.PromptTuning(2, "kernel", "uniform")),
        ("prefix", jpeft.Adapter(2, "bias")),
        ("prompt", LOW),
    ],
)
def test_a_state_of_another_method(name, other):
    with pytest.raises(jpeft.TargetError, match="the trained state at '.*of another method"):
        METHODS[name].rewrite(PARAMS, drawn(other, PARAMS))


@pytest.mark.parametrize(
    ("method", "of", "told"),
    [
        (jpeft.LoRA(4, 8.0, "kernel"), LOW, r"a is \(6, 2\), not \(6, 4\)"),
        (jpeft.LoRA(2, 8.0, "kernel", parts={"k": (2, (1,))}), LOW, r"b is \(2, 4\), not \(2, 2\)"),
        (LOW, jpeft.LoRA(2, 8.0, "kernel", dora=True), "LoRA with dora=True, the .* dora=False"),
        (jpeft.Train("kernel", last=3), jpeft.Train("kernel"), r"\(6, 4\), not \(3, 4\)"),
        (jpeft.Adapter(3, "bias"), jpeft.Adapter(2, "bias"), r"down is \(4, 2\), not \(4, 3\)"),
        (jpeft.Subspace(3), LOW, "no coordinates"),
        (LOW, jpeft.chain(LOW), "is a tuple, not a dictionary by path"),
        (jpeft.chain(LOW), LOW, "is a dict, a chain's is a tuple"),
    ],
)
def test_what_is_told(method, of, told):
    with pytest.raises(jpeft.TargetError, match=told):
        method.rewrite(PARAMS, drawn(of, PARAMS))


def test_a_state_of_a_parameter_with_fewer_axes():
    with pytest.raises(jpeft.TargetError, match=r"with axes 'io', here it has shape \(3, 6, 4\)"):
        LOW.rewrite(STACKED, drawn(LOW, PARAMS))


def test_a_stack_of_states_without_task():
    with pytest.raises(jpeft.TargetError, match=r"a is \(2, 6, 2\), not \(6, 2\)"):
        LOW.rewrite(PARAMS, jpeft.stack([drawn(LOW, PARAMS)] * 2))
