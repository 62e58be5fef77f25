"""IA3 against HF PEFT, and LoRA+'s groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.optim import lora_plus_groups

W = jax.random.normal(jax.random.key(1), (6, 8))


def test_scales_have_the_axes_they_scale():
    params = {"k": W, "down": W, "stack": jnp.ones((3, 6, 8))}
    method = jpeft.IA3(r"k$|stack", r"down", axes={"stack": "bio"})
    state = method.init(jax.random.key(0), params)
    assert {p: s.scale.shape for p, s in state.items()} == {
        "k": (8,),
        "stack": (3, 8),
        "down": (6,),
    }
    state["down"] = jpeft.Scales(jnp.arange(6.0), "io", "i")
    merged = jpeft.merge(method.rewrite(params, state))
    np.testing.assert_allclose(merged["down"], jnp.arange(6.0)[:, None] * W)


def test_a_pattern_that_matches_nothing_is_told():
    with pytest.raises(jpeft.TargetError, match="'kee' matches no parameter"):
        jpeft.IA3("k$", "kee").init(jax.random.key(0), {"k": W})
    with pytest.raises(jpeft.TargetError, match="no pattern was given"):
        jpeft.IA3().init(jax.random.key(0), {"k": W})
    with pytest.raises(jpeft.TargetError, match=r"IA3 needs a matrix, but 'b'"):
        jpeft.IA3("b$").init(jax.random.key(0), {"b": jnp.ones(3)})


@pytest.mark.interop
@pytest.mark.parametrize("feedforward", [False, True])
def test_equals_hf_peft(feedforward):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(6, 8)

        def forward(self, x):
            return self.w(x)

    config = peft.IA3Config(target_modules=["w"], feedforward_modules=["w"] if feedforward else [])
    theirs = peft.get_peft_model(Net(), config)
    layer = theirs.base_model.model.w
    scale = np.linspace(0.5, 2, 6 if feedforward else 8).astype(np.float32)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(np.array(W.T)))
        layer.base_layer.bias.zero_()
        layer.ia3_l["default"].copy_(torch.tensor(scale).reshape(layer.ia3_l["default"].shape))
    method = jpeft.IA3(feedforward="w$") if feedforward else jpeft.IA3("w$")
    side = "i" if feedforward else "o"
    rewritten = method.rewrite({"w": W}, {"w": jpeft.Scales(jnp.asarray(scale), "io", side)})
    x = jax.random.normal(jax.random.key(2), (4, 6))
    ours = jpeft.lift(lambda p, x: x @ p["w"])(rewritten, x)
    want = theirs(torch.tensor(np.array(x))).detach().numpy()
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_lora_plus_moves_b_by_the_ratio():
    params = {"w": W, "bias": jnp.zeros(8), "embedding": jnp.ones((10, 8))}
    method = jpeft.chain(jpeft.LoRA(2, 4.0, "w$|embedding$"), jpeft.Train("bias$"))
    state = method.init(jax.random.key(0), params)
    groups = lora_plus_groups(state)
    assert (groups[0]["w"].a, groups[0]["w"].b) == ("a", "b")
    assert groups[0]["embedding"].a == groups[0]["embedding"].b == "embedding"
    assert groups[1]["bias"] == "b without decay"
    optimiser = jpeft.lora_plus(1e-3, ratio=16.0)
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, state), optimiser.init(state), state)
    step = {"a": 1e-3, "b": 16e-3, "b without decay": 16e-3, "embedding": 1e-6}
    for group, u in zip(jax.tree.leaves(groups), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(u, -step[group], rtol=1e-4)


def test_lora_plus_counts_an_adapters_stacked_biases_as_biases():
    adapter = jpeft.Adapter(2, "bias", axes={"bias": "bo"})
    state = adapter.init(jax.random.key(0), {"bias": jnp.zeros((3, 4))})
    groups = lora_plus_groups(state)["bias"]
    assert (groups.down, groups.up) == ("a", "a")
    assert groups.down_bias == groups.up_bias == "b without decay"


def test_lora_plus_takes_a_schedule_and_decays_matrices_alone():
    state = {"w": jpeft.Factors(jnp.ones((6, 2)), jnp.ones((2, 8))), "bias": jnp.ones(8)}
    optimiser = jpeft.lora_plus(
        optax.linear_schedule(1e-3, 0, 10), ratio=4.0, weight_decay=0.5, embedding_rate=None
    )
    zero = jax.tree.map(jnp.zeros_like, state)
    updates, _ = jax.jit(optimiser.update)(zero, optimiser.init(state), state)
    np.testing.assert_allclose(updates["w"].a, -1e-3 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["w"].b, -4e-3 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], 0)
    with pytest.raises(ValueError, match="ratio must be above 0, got 0"):
        jpeft.lora_plus(1e-3, ratio=0.0)
