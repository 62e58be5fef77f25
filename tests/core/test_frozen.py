"""What a training step is given beside what it trains, and the names of its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

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
