"""What a training step is given beside what it trains, and the names of its axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.models.bert import Bert, BertConfig

PARAMS = {
    "embed": {"table": jnp.ones((7, 4))},
    "up": {"kernel": jnp.full((4, 6), 0.5), "bias": jnp.zeros(6)},
}
NAMES = {
    "embed/table": ("vocab", "embed"),
    "up/kernel": ("embed", "mlp"),
    "up/bias": ("mlp",),
}
KEY = jax.random.key(0)


def apply(params, ids):
    return jnp.tanh(params["embed"]["table"][ids] @ params["up"]["kernel"]) + params["up"]["bias"]


def axes(path, shape):
    return NAMES.get(path)


@pytest.mark.parametrize(
    ("transform", "read"),
    [
        (jpeft.Train(r".*"), set()),
        (jpeft.Train(r"bias$"), {"embed/table", "up/kernel"}),
        (jpeft.LoRA(rank=2, targets=r"kernel$"), set(NAMES)),
        (
            jpeft.chain(jpeft.LoRA(rank=2, targets=r"kernel$"), jpeft.Train("bias")),
            {"embed/table", "up/kernel"},
        ),
        (jpeft.Train(r"table$", last=2), set(NAMES)),
    ],
)
def test_only_what_is_read_is_kept(transform, read):
    trainable = transform.init(KEY, PARAMS)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    base = jpeft.frozen(transform, PARAMS, trainable)
    assert set(base.arrays) == read
    forward = jpeft.lift(apply)

    @jax.jit
    def step(arrays, trainable, ids):
        return forward(transform.rewrite(base.params(arrays), trainable), ids)

    ids = jnp.array([1, 6])
    want = forward(transform.rewrite(PARAMS, trainable), ids)
    np.testing.assert_allclose(step(base.arrays, trainable, ids), want, rtol=1e-6)


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    trainable = jax.eval_shape(lambda: jpeft.Train("up").init(KEY, PARAMS))
    assert set(jpeft.frozen(jpeft.Train("up"), shapes, trainable).arrays) == {"embed/table"}


def test_layers_apart_are_no_stack_in_a_straight_line_program():
    config = BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=8,
    )  # fmt: skip
    model = Bert(config, rngs=nnx.Rngs(0), pooler=False, unroll=8)
    apply, params = jpeft.functional(model)
    ids = jnp.ones((2, 3), jnp.int32)
    transform = jpeft.LoRA(rank=2, targets=r"kernel$")
    uses = jpeft.uses(apply, params, ids)
    state = jax.tree.map(lambda x: x + 0.1, transform.init(KEY, params, uses=uses))
    whole = jpeft.frozen(transform, params, state)
    apart = whole.by_layer(uses)
    kernel = "encoder/layer/intermediate/dense/kernel"
    assert [x.shape for x in apart.arrays[kernel]] == [(32, 256)] * 4
    assert apart.arrays["embeddings/word_embeddings/embedding"].shape == (16, 32)
    shapes = jax.eval_shape(lambda: whole.arrays)
    of_shapes = dataclasses.replace(whole, arrays=shapes).by_layer(uses).arrays
    assert of_shapes == jax.eval_shape(lambda: apart.arrays)

    def compiled(base):
        def loss(state, arrays):
            rewritten = transform.rewrite(base.params(arrays), state)
            return jnp.sum(jpeft.lift(apply)(rewritten, ids) ** 2)

        return jax.jit(jax.value_and_grad(loss)).lower(state, base.arrays).compile()

    steps = {"apart": compiled(apart), "whole": compiled(whole)}
    results = steps["apart"](state, apart.arrays), steps["whole"](state, whole.arrays)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    temporaries = {k: s.memory_analysis().temp_size_in_bytes for k, s in steps.items()}
    # The weights of four layers are 0.3 MB, all else is a fraction of that.
    assert temporaries["apart"] < 0.5 * temporaries["whole"]


def test_factors_have_their_bases_names():
    transform = jpeft.chain(jpeft.LoRA(rank=2, targets=r"(kernel|table)$"), jpeft.Train(r"bias$"))
    got = jpeft.trainable_axes(transform, PARAMS, transform.init(KEY, PARAMS), axes)
    assert got == {
        "0/embed/table/a": ("vocab", None),
        "0/embed/table/b": (None, "embed"),
        "0/up/kernel/a": ("embed", None),
        "0/up/kernel/b": (None, "mlp"),
        "1/up/bias": ("mlp",),
    }


def test_what_is_computed_with_first_has_no_names():
    transform = jpeft.Subspace(8)
    assert jpeft.trainable_axes(transform, PARAMS, transform.init(KEY, PARAMS), axes) == {}
    trained = jpeft.Train(r"bias$").init(KEY, PARAMS)
    assert jpeft.trainable_axes(jpeft.Train(r"bias$"), PARAMS, trained, lambda *_: None) == {}
