"""A published NNX Llama, as it comes (google-tunix, `tunix.models.llama3`): kernels of three axes
behind einsums, rotary positions, fewer key and value heads, tied embeddings.
"""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft

pytestmark = pytest.mark.interop
N, ROWS, T = 3, 19, 5
LORA = jpeft.LoRA(2, 4.0, r"attn/[qkvo]_proj/w$")
ADAPTER = jpeft.Adapter(4, r"(o_proj/w|down_proj/kernel)$", zero_up=True)
PROMPT = jpeft.PromptTuning(N, r"input_embedding$")
PREFIX = jpeft.PrefixTuning(N, r"[kv]_proj/w$", std=0.5)


@pytest.fixture(scope="module")
def llama():
    """The package's module of the model."""
    spec = importlib.util.find_spec("tunix")
    if spec is None:
        pytest.skip("google-tunix is not installed")
    # The package's own __init__ imports its trainers, and all that they need: leave it out.
    bare = types.ModuleType("tunix")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["tunix"] = bare
    yield importlib.import_module("tunix.models.llama3.model")
    for name in [n for n in sys.modules if n.split(".")[0] == "tunix"]:
        del sys.modules[name]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(llama, request):
    """`(apply, params, uses)`; `apply(params, ids)` gives logits, causally."""
    config = llama.ModelConfig(
        num_layers=2,
        vocab_size=ROWS,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=request.param,
    )
    inner, params = jpeft.functional(llama.Llama3(config, rngs=nnx.Rngs(0)))
    # It makes some kernels of zeros, behind which nothing has a gradient.
    params = noisy(params, 7)

    def apply(params, ids):
        t = ids.shape[1]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (ids.shape[0], t, t))
        return inner(params, ids, jnp.broadcast_to(jnp.arange(t), ids.shape), None, mask)[0]

    return apply, params, jpeft.uses(apply, params, ids(0))


def ids(room):
    real = jax.random.randint(jax.random.key(1), (2, T), 0, ROWS)
    batch = {"input_ids": real}
    return jpeft.virtual_tokens(batch, length=room, first=ROWS)["input_ids"] if room else real


def noisy(tree, seed):
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return shape.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])


def moved(method, model, seed=2):
    _, params, uses = model
    state = method.init(jax.random.key(0), params, uses=uses)
    return noisy(state, seed)


@pytest.mark.parametrize("method", [LORA, ADAPTER], ids=["lora", "adapter"])
def test_it_starts_at_the_model(model, method):
    apply, params, uses = model
    state = method.init(jax.random.key(0), params, uses=uses)
    out = jax.jit(jpeft.lift(apply))(method.rewrite(params, state), ids(0))
    np.testing.assert_allclose(out, apply(params, ids(0)), rtol=1e-5, atol=1e-5)


def test_lora_is_its_merged_weights(model):
    apply, params, _ = model
    rewritten = LORA.rewrite(params, moved(LORA, model))
    out = jax.jit(jpeft.lift(apply))(rewritten, ids(0))
    want = apply(jpeft.merge(rewritten), ids(0))
    assert float(jnp.abs(want - apply(params, ids(0))).max()) > 0.05
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_words_is_those_words(model):
    apply, params, _ = model
    method = jpeft.PromptTuning(N, PROMPT.targets, init_from="text", tokens=((4, 7, 2),))
    state = method.init(jax.random.key(0), params)
    out = jax.jit(jpeft.lift(apply))(method.rewrite(params, state), ids(N))
    words = jnp.broadcast_to(jnp.array([4, 7, 2]), (2, N))
    want = apply(params, jnp.concatenate([words, ids(0)], axis=1))
    assert out.shape == (2, N + T, ROWS)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_a_prefix_of_the_models_own_keys_and_values_is_no_change(model):
    apply, params, uses = model
    state = PREFIX.init(jax.random.key(0), params, uses=uses)
    assert {f.values.shape for f in state.values()} == {(N, 2 * 4)}  # of the key and value heads
    words = jnp.broadcast_to(jnp.array([4, 7, 2]), (2, N))
    whole = jnp.concatenate([words, ids(0)], axis=1)
    # The first layer's own keys and values of these words, taken from its normalised input.
    x = params["embedder"]["input_embedding"][words[0]]
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    x = x * params["layers"][0]["input_layernorm"]["w"]
    first = {
        f"layers/0/attn/{n}_proj/w": jpeft.Prefix(
            jnp.einsum("td,dnh->tnh", x, params["layers"][0]["attn"][f"{n}_proj"]["w"]).reshape(
                N, 8
            ),
            "ioo",
        )
        for n in "kv"
    }
    method = jpeft.PrefixTuning(N, r"layers/0/attn/[kv]_proj/w$")
    out = jax.jit(jpeft.lift(apply))(method.rewrite(params, first), whole)
    np.testing.assert_allclose(out, apply(params, whole), rtol=1e-4, atol=1e-4)
    # And another prefix is one.
    again = jax.jit(jpeft.lift(apply))(PREFIX.rewrite(params, moved(PREFIX, model)), whole)
    assert float(jnp.abs(again[:, N:] - out[:, N:]).max()) > 0.02


@pytest.mark.parametrize(
    "method",
    [LORA, ADAPTER, PROMPT, PREFIX, jpeft.chain(LORA, ADAPTER, PROMPT)],
    ids=["lora", "adapter", "prompt", "prefix", "three"],
)
def test_many_tasks_and_gradients(model, method):
    apply, params, _ = model
    room = N if "Prompt" in repr(method) or "Prefix" in repr(method) else 0
    states = [moved(method, model, seed) for seed in (2, 3)]
    forward = jax.jit(jpeft.lift(apply))
    alone = [forward(method.rewrite(params, s), ids(room)) for s in states]
    mixed = forward(method.rewrite(params, jpeft.stack(states), task=jnp.array([1, 0])), ids(room))
    np.testing.assert_allclose(mixed[0], alone[1][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mixed[1], alone[0][1], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(alone[0] - alone[1])[:, -1].max()) > 0.01
    grads = jax.jit(
        jax.grad(lambda s: jnp.sum(jpeft.lift(apply)(method.rewrite(params, s), ids(room)) ** 2))
    )(states[0])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
