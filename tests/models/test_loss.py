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


def products(f, *args):
    """How many products of a `(d, v)` table the program of `f` has."""
    from sharding.costs import traced_flops

    b, t, d = HIDDEN.shape
    return traced_flops(jax.make_jaxpr(f)(*args)) / (2 * b * t * d * TABLE.shape[1])


def test_logits_are_made_once_for_a_frozen_head_and_twice_for_one_that_is_trained():
    def loss(table, hidden):
        return chunked(table, hidden, LABELS, False, 3)[0]

    assert products(loss, TABLE, HIDDEN) == 1
    assert products(jax.grad(loss, 1), TABLE, HIDDEN) == 2  # and their gradient's with the table
    assert products(jax.grad(loss, (0, 1)), TABLE, HIDDEN) == 4
    assert products(jax.grad(jax.jit(loss), 1), TABLE, HIDDEN) == 2
    lifted = jpeft.lift(lambda p, h: loss(p["head"], h))
    assert products(jax.grad(lifted, 1), {"head": TABLE}, HIDDEN) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_ways_have_the_same_gradient(dtype):
    table, hidden = TABLE.astype(dtype), HIDDEN.astype(dtype)

    def mean(table, hidden):
        total, count = chunked(table, hidden, LABELS, True, 4)
        return total / count

    once = jax.jit(jax.grad(mean, 1))(table, hidden)
    twice = jax.jit(jax.grad(mean, (0, 1)))(table, hidden)[1]
    assert once.dtype == dtype
    tolerance = {"atol": 1e-6} if dtype == jnp.float32 else {"atol": 2e-3, "rtol": 2e-2}
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (once, twice)), **tolerance)


def test_a_gradient_that_nobody_asks_for_is_none():
    grad = jax.grad(lambda h: 0.0 * h.sum() + jax.lax.stop_gradient(loss_at(h)))(HIDDEN)
    assert not np.any(grad)
    by_row = jax.vmap(jax.grad(lambda h, y: loss_at(h[None], y[None])))(HIDDEN, LABELS)
    np.testing.assert_allclose(by_row, jax.grad(loss_at)(HIDDEN), atol=1e-5)


def loss_at(hidden, labels=LABELS):
    return chunked(TABLE, hidden, labels, True, 4)[0]


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

    # Its factors get their gradients without a dense one of the table.
    def of(state):
        return jpeft.lift(loss)(method.rewrite(params, state), HIDDEN, LABELS)

    def merged(state):
        return loss(jpeft.merge(method.rewrite(params, state)), HIDDEN, LABELS)

    for g, h in zip(*(jax.tree.leaves(jax.grad(f)(state)) for f in (of, merged)), strict=True):
        np.testing.assert_allclose(g, h, atol=1e-5)
    shapes = {v.aval.shape for v in jax.make_jaxpr(jax.grad(of))(state).jaxpr.outvars}
    assert TABLE.shape not in shapes
    assert products(jax.grad(of), state) < 4


def test_a_quantised_head_is_frozen():
    wide = jax.random.normal(KEYS[1], (64, 50))
    hidden = jax.random.normal(KEYS[0], (3, 7, 64))
    codes = {"head": jpeft.Quantize("head", "int8").leaf("head", wide)}

    def loss(hidden, params):
        return chunked(params["head"], hidden, LABELS, True, 4)[0]

    got = jax.grad(lambda h: jpeft.lift(loss)(h, codes))(hidden)
    want = jax.grad(loss)(hidden, jpeft.merge(codes))
    np.testing.assert_allclose(got, want, atol=1e-4)


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


def test_labels_are_found_by_comparing():
    # A look-up's gradient would be scattered into zeros of the logits' size.
    def loss(hidden, table):
        return chunked(table, hidden, LABELS, True, 4)[0]

    for at in (0, 1):
        program = str(jax.make_jaxpr(jax.grad(loss, at))(HIDDEN, TABLE))
        assert "dot_general" in program
        assert "scatter" not in program


def test_second_derivatives():
    def of(f):
        return jax.grad(lambda h: jnp.sum(jax.grad(lambda h: f(TABLE, h))(h) ** 2))

    got = of(lambda table, h: chunked(table, h, LABELS, True, 4)[0])(HIDDEN)
    want = of(lambda table, h: plain(table, h, LABELS, True)[0])(HIDDEN)
    assert np.any(want)
    np.testing.assert_allclose(got, want, atol=1e-4)
