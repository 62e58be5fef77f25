"""The chunked loss is the plain one, in value and gradient, with fewer logits alive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.models.loss import IGNORED, next_token_loss

KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (3, 7, 8))
TABLE = jax.random.normal(KEYS[1], (8, 50))
LABELS = jax.random.randint(KEYS[2], (3, 7), 0, 50).at[0, :3].set(IGNORED).at[2, 5].set(IGNORED)


def plain(table, hidden, labels, shift):
    logits = hidden @ table
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return jnp.sum(each * valid), jnp.sum(valid)


def chunked(table, hidden, labels, shift, chunk):
    return next_token_loss(hidden, lambda x: x @ table, labels, chunk=chunk, shift=shift)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
def test_it_is_the_plain_loss(chunk, shift):
    want, count = plain(TABLE, HIDDEN, LABELS, shift)
    got, n = chunked(TABLE, HIDDEN, LABELS, shift, chunk)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert n == count
    for at in (0, 1):
        g = jax.grad(lambda *a: plain(*a, LABELS, shift)[0], at)(TABLE, HIDDEN)
        h = jax.grad(lambda *a: chunked(*a, LABELS, shift, chunk)[0], at)(TABLE, HIDDEN)
        np.testing.assert_allclose(h, g, atol=1e-5)


def test_no_labels_are_no_loss():
    got, n = chunked(TABLE, HIDDEN, jnp.full((3, 7), IGNORED), True, 4)
    assert got == 0
    assert n == 0


def test_a_rewritten_head_is_read():
    method = jpeft.LoRA(2, 4.0, "head")
    params = {"head": TABLE}
    state = method.init(KEYS[0], params)
    # Not a constant: one that moves all logits alike would not move the loss.
    state = jax.tree.map(lambda x: jax.random.normal(KEYS[1], x.shape), state)
    rewritten = method.rewrite(params, state)

    def loss(params, hidden, labels):
        return chunked(params["head"], hidden, labels, True, 4)[0]

    got = jpeft.lift(loss)(rewritten, HIDDEN, LABELS)
    want = loss(jpeft.merge(rewritten), HIDDEN, LABELS)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert not np.allclose(got, loss(params, HIDDEN, LABELS), rtol=1e-3)


def test_fewer_logits_are_alive():
    b, t, d, v = 4, 256, 8, 4096
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((d, v), (b, t, d))]
    shapes.append(jax.ShapeDtypeStruct((b, t), jnp.int32))

    def temporaries(f):
        step = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries(lambda *a: plain(*a, True)[0])
    parts = temporaries(lambda *a: chunked(*a, True, 64)[0])
    assert whole > b * t * v * 4
    assert parts < whole / 4
