"""Which axes stay split: followed through a program, and as the partitioner says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft._flat import Flat
from jpeft._split import splits, whole


def followed(fun, *args):
    """How the results are split; each argument is a shape and its split."""
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x, _ in args]
    flat = Flat(jax.make_jaxpr(fun)(*shapes))
    found = splits(flat, [s for _, s in args])
    return [found[v] for v in flat.outs]


def attention(q, k):
    return jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)


def loop(x, w):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), jnp.sum(x)), x, w)


def sums(x):
    """A carry that starts whole, and is split by what is added."""
    return jax.lax.scan(lambda a, x: (a + x, None), jnp.zeros(x.shape[1:]), x)[0]


CASES = {
    "columns": (lambda x, w: x @ w, [((4, 8), (1, 1)), ((8, 6), (1, 2))], [(1, 2)]),
    "rows are summed": (lambda x, w: x @ w, [((4, 8), (1, 2)), ((8, 6), (2, 1))], [(1, 1)]),
    "batched": (
        lambda x, w: jnp.einsum("bij,bjk->bik", x, w),
        [((4, 3, 8), (2, 1, 1)), ((4, 8, 6), (1, 1, 3))],
        [(2, 1, 3)],
    ),
    "heads": (lambda x: x.reshape(2, 5, 4, 3), [((2, 5, 12), (1, 1, 2))], [(1, 1, 2, 1)]),
    "heads joined": (lambda x: x.reshape(2, 5, 12), [((2, 5, 4, 3), (1, 1, 2, 1))], [(1, 1, 2)]),
    "not the first": (lambda x: x.reshape(2, 5, 12), [((2, 5, 4, 3), (1, 1, 1, 3))], [(1, 1, 1)]),
    "attention": (attention, [((2, 5, 4, 3), (1, 1, 2, 1))] * 2, [(1, 2, 1, 1)]),
    "transposed": (lambda x: x.transpose(2, 0, 1), [((2, 4, 6), (1, 2, 3))], [(3, 1, 2)]),
    "reduced": (lambda x: jnp.max(x, 1), [((2, 4, 6), (1, 1, 2))], [(1, 2)]),
    "broadcast": (lambda x: x[:, None, :] * jnp.ones((2, 7, 6)), [((2, 6), (1, 3))], [(1, 1, 3)]),
    "cut": (lambda x: x[:, :3], [((4, 6), (2, 3))], [(2, 1)]),
    "joined": (lambda x: jnp.concatenate([x, x], 1), [((4, 6), (2, 3))], [(2, 1)]),
    "split": (lambda x: jnp.split(x, 2, 1)[0], [((4, 6), (2, 3))], [(2, 1)]),
    "padded": (lambda x: jnp.pad(x, ((0, 0), (1, 0))), [((4, 6), (2, 3))], [(2, 1)]),
    "table": (lambda x: x[jnp.array([0, 2])], [((4, 6), (2, 3))], [(1, 3)]),
    "axes of one": (lambda x: x[None, :, None, 0], [((4, 6), (2, 3))], [(1, 2, 1)]),
    "loop": (loop, [((4, 8), (1, 1)), ((3, 8, 8), (1, 1, 2))], [(1, 2), (1,)]),
    "what is carried": (sums, [((3, 4, 6), (1, 2, 3))], [(2, 3)]),
    "empty": (lambda x: x.reshape(0, 6), [((0, 2, 3), (1, 2, 3))], [(1, 1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_axes(name):
    fun, args, wanted = CASES[name]
    assert followed(fun, *args) == wanted


def test_a_gradient_is_split_as_its_weight():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    assert followed(jax.grad(loss), ((8, 6), (1, 2)), ((4, 8), (1, 1))) == [(1, 2)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_any_reshape_keeps_parts_that_fit(shape, random):
    """Of any shape into any other of as many elements: each axis has whole parts."""
    left = int(np.prod(shape))
    after = []
    while left > 1:
        n = random.choice([d for d in range(2, left + 1) if left % d == 0])
        after.append(n)
        left //= n
    split = tuple(random.choice([d for d in range(1, n + 1) if n % d == 0]) for n in shape)
    (found,) = followed(lambda x: x.reshape(after), (tuple(shape), split))
    assert len(found) == len(after)
    assert all(n % s == 0 for n, s in zip(after, found, strict=True))
    assert set(found) <= {1, *split}


@pytest.mark.parametrize("name", ["columns", "heads", "heads joined", "attention", "reduced"])
def test_the_partitioner_splits_the_same(name):
    fun, args, _ = CASES[name]
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    given = [
        jax.ShapeDtypeStruct(
            shape,
            jnp.float32,
            sharding=NamedSharding(
                mesh, PartitionSpec(*("tensor" if s == 2 else None for s in split))
            ),
        )
        for shape, split in args
    ]
    out = jax.jit(fun).lower(*given).compile().output_shardings
    (shape,) = (x.shape for x in jax.tree.leaves(jax.eval_shape(fun, *given)))
    parts = tuple(n // m for n, m in zip(shape, out.shard_shape(shape), strict=True))
    assert [parts] == followed(fun, *args)


def test_nothing_is_split_where_nothing_was():
    assert followed(attention, *[((2, 5, 4, 3), whole((2, 5, 4, 3)))] * 2) == [(1, 1, 1, 1)]
