"""Shifted sparse attention: what the definition says, no look ahead, linear cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.models.shifted import shifted_attention

KEYS = jax.random.split(jax.random.key(0), 3)
T, GROUP, H, W = 16, 4, 4, 8


def tensors(kv=H, t=T):
    shapes = ((2, t, H, W), (2, t, kv, W), (2, t, kv, W))
    return [jax.random.normal(k, s) for k, s in zip(KEYS, shapes, strict=True)]


def positions(t=T):
    return jnp.broadcast_to(jnp.arange(t), (2, t))


def run(q, k, v, p, group=GROUP, segments=None):
    return shifted_attention(q, k, v, p, group=group, scale=W**-0.5, segments=segments)


def by_definition(q, k, v):
    """Head by head, token by token: those of its group, not later ones."""
    k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros(q.shape)
    for head in range(H):
        shift = GROUP // 2 if head >= H // 2 else 0
        for i in range(T):
            # The groups of shifted heads start half a group in; the row's ends are shorter ones.
            start = max(0, (i - shift) // GROUP * GROUP + shift)
            seen = np.arange(start, i + 1)
            scores = np.einsum("bw,bsw->bs", q[:, i, head], k[:, seen, head]) * W**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[:, i, head] = np.einsum("bs,bsw->bw", weights, v[:, seen, head])
    return out


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_it_is_the_definition(kv):
    q, k, v = tensors(kv)
    want = by_definition(*(np.asarray(x) for x in (q, k, v)))
    np.testing.assert_allclose(run(q, k, v, positions()), want, atol=1e-5)


def test_no_output_depends_on_a_later_token():
    q, k, v = tensors()

    def out(x):
        return run(x, x, x, positions())[0].reshape(T, -1)

    moved = jax.jacobian(lambda x: out(x[None].repeat(2, 0)))(q[0])
    depends = np.abs(np.asarray(moved)).reshape(T, H * W, T, H * W).max((1, 3)) > 0
    assert not np.triu(depends, 1).any()
    assert depends[:, :].diagonal().all()
    assert depends[GROUP, GROUP - 1]  # through the shifted heads, over the border of a group
    del k, v


def test_segments_and_padding_are_not_read():
    q, k, v = tensors()
    segments = jnp.broadcast_to(jnp.arange(T) // 5, (2, T))
    other = v.at[:, :5].add(1.0)
    a = run(q, k, v, positions(), segments=segments)
    b = run(q, k, other, positions(), segments=segments)
    np.testing.assert_array_equal(a[:, 5:], b[:, 5:])
    assert not np.allclose(a[:, :5], b[:, :5])
    padded = positions().at[:, 3].set(-1)
    other = v.at[:, 3].add(1.0)
    a, b = run(q, k, v, padded), run(q, k, other, padded)
    np.testing.assert_array_equal(np.delete(a, 3, 1), np.delete(b, 3, 1))


@pytest.mark.parametrize(
    ("t", "group", "message"),
    [
        (16, 3, "16 tokens do not split into groups of 3"),
        (18, 4, "18 tokens do not split into groups of 4"),
    ],
)
def test_rows_that_do_not_split(t, group, message):
    with pytest.raises(ValueError, match=message):
        run(*tensors(t=t), positions(t), group)


def test_the_cost_is_linear_in_the_length():
    def cost(t):
        shapes = [jax.ShapeDtypeStruct((1, t, H, W), jnp.float32)] * 3
        step = jax.jit(lambda *a: run(*a, jnp.arange(t)[None], group=256))
        compiled = step.lower(*shapes).compile()
        analysis = compiled.cost_analysis()
        flops = (analysis if isinstance(analysis, dict) else analysis[0])["flops"]
        return flops, compiled.memory_analysis().temp_size_in_bytes

    (f1, m1), (f2, m2) = cost(1024), cost(4096)
    assert f2 < 4.2 * f1
    assert m2 < 4.2 * m1
