"""Layers handed to a step apart: the same results, and no stack in a straight-line program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.models.bert import Bert, BertConfig
from jpeft.models.gpt2 import Gpt2, Gpt2Config

IDS = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)


def encoder(**options):
    config = BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=8,
    )  # fmt: skip
    return Bert(config, rngs=nnx.Rngs(0), pooler=False, **options)


def decoder(**options):
    config = Gpt2Config(vocab_size=16, n_positions=8, n_embd=32, n_layer=3, n_head=2)
    return Gpt2(config, rngs=nnx.Rngs(0), **options)


MODELS = {"encoder": (encoder, {}), "one position": (encoder, {"at": 1}), "decoder": (decoder, {})}
TRANSFORMS = {
    "lora": jpeft.LoRA(rank=2, targets=r"kernel$"),
    "full": jpeft.Train(r".*"),
    "bias": jpeft.chain(jpeft.Adapter(3, r"dense/bias$|c_proj/bias$"), jpeft.Train(r"scale$")),
    "kernel": jpeft.chain(
        jpeft.IA3(r"(intermediate/dense|c_fc)/kernel$"),
        jpeft.Adapter(3, r"dense/kernel$|c_proj/kernel$"),
        jpeft.PrefixTuning(2, r"(key|value)/kernel$|c_attn/kernel$"),
    ),
}


def step_of(name, method, apart, unroll=8, products=False):
    """A compiled loss and gradient, and what it is called with."""
    make, options = MODELS[name]
    apply, params = jpeft.functional(make(unroll=unroll))
    transform = TRANSFORMS[method]
    uses = jpeft.uses(apply, params, IDS)
    state = transform.init(jax.random.key(0), params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state)
    base = jpeft.frozen(transform, params, state)
    arrays = base.arrays
    if apart:
        arrays = jpeft.by_layer(arrays, uses)
        state = jpeft.by_layer(state, uses) if method == "full" else state

    def loss(state, arrays):
        frozen = base.params(arrays)
        rewritten = transform.rewrite(frozen, state)
        if products:
            rewritten = jpeft.cpu_products(rewritten, frozen)
        out = jpeft.lift(apply)(rewritten, IDS, **options)
        return jnp.sum(jnp.tanh(jax.tree.leaves(out)[0]) ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(state, arrays).compile(), (state, arrays)


CASES = [("one position", "lora"), ("encoder", "bias"), ("encoder", "full"), ("decoder", "full")]


@pytest.mark.parametrize(
    ("name", "method"),
    [*CASES, ("decoder", "lora"), ("encoder", "kernel"), ("decoder", "kernel")],
)
def test_layers_apart_give_the_same(name, method):
    step, inputs = step_of(name, method, True, products=True)
    value, grads = step(*inputs)
    assert method != "full" or any(isinstance(x, jpeft.Layers) for x in grads.values())
    loop, inputs = step_of(name, method, False, unroll=1)
    want, theirs = loop(*inputs)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    grads = jpeft.merge(grads) if method == "full" else grads
    for a, b in zip(*map(jax.tree.leaves, (grads, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), CASES[::3])
def test_a_straight_line_program_has_no_stack(name, method):
    temporaries = {
        apart: step_of(name, method, apart)[0].memory_analysis().temp_size_in_bytes
        for apart in (True, False)
    }
    # The weights of three layers are 0.2 MB, all else is a fraction of that.
    assert temporaries[True] < 0.6 * temporaries[False]


def test_a_loop_stacks_them_again():
    step, inputs = step_of("decoder", "full", True, unroll=1)
    want = step_of("decoder", "full", False, unroll=1)
    for a, b in zip(
        jax.tree.leaves(jpeft.merge(step(*inputs))), jax.tree.leaves(want[0](*want[1])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_optimiser_moves_them_as_it_moves_the_stack():
    step, (state, arrays) = step_of("encoder", "full", True)
    _, grads = step(state, arrays)
    optimiser = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))

    def moved(state, grads):
        updates, _ = optimiser.update(grads, optimiser.init(state), state)
        return optax.apply_updates(state, updates)

    apart = jpeft.merge(moved(state, grads))
    whole = moved(jpeft.merge(state), jpeft.merge(grads))
    assert jax.tree.structure(apart) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (apart, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_leaf():
    rows = tuple(jnp.full((2, 3), float(i)) for i in range(4))
    leaf = jpeft.Layers(rows, "x")
    assert (leaf.shape, leaf.size, leaf.ndim, leaf.dtype) == ((4, 2, 3), 24, 3, jnp.float32)
    stack = jnp.stack(rows)
    np.testing.assert_array_equal(jpeft.merge(leaf), stack)
    assert leaf.astype(jnp.bfloat16).dtype == jnp.bfloat16
    for f in (
        lambda x: x[1],
        lambda x: x[1:3] * 2,
        lambda x: jax.lax.slice_in_dim(x, 0, 4, 2) + 1,
        lambda x: x[:, 0],
        lambda x: x.astype(jnp.bfloat16)[2],
        lambda x: x.transpose(1, 0, 2),
        jnp.sum,
    ):
        np.testing.assert_array_equal(jpeft.lift(f)(leaf), f(stack))


def test_what_is_not_sliced_stays_whole():
    apply, params = jpeft.functional(encoder())
    uses = jpeft.uses(apply, params, IDS)
    arrays = jpeft.frozen(TRANSFORMS["lora"], params, {}).arrays
    apart = jpeft.by_layer(arrays, uses)
    assert (
        apart["embeddings/word_embeddings/embedding"]
        is arrays["embeddings/word_embeddings/embedding"]
    )
    bias = "encoder/layer/intermediate/dense/bias"
    assert apart[bias] is arrays[bias]  # a stack of vectors
    kernel = apart["encoder/layer/intermediate/dense/kernel"]
    assert [x.shape for x in kernel.base] == [(32, 256)] * 3
    shapes = jpeft.by_layer(jax.eval_shape(lambda: arrays), uses)
    assert shapes == jax.eval_shape(lambda: apart)
    assert jpeft.by_layer(apart, uses) == apart
    assert dataclasses.replace(kernel, path="y").path == "y"


def test_the_last_layers_are_trained_beside_layers_apart():
    apply, params = jpeft.functional(encoder())
    transform = jpeft.Train(r"layer/.*kernel$", last=2)
    state = jax.tree.map(lambda x: x + 1, transform.init(jax.random.key(0), params))
    base = jpeft.frozen(transform, params, state)
    arrays = jpeft.by_layer(base.arrays, jpeft.uses(apply, params, IDS))
    got = jpeft.merge(transform.rewrite(base.params(arrays), state))
    want = transform.rewrite(params, state)
    jax.tree.map(np.testing.assert_array_equal, got, want)
