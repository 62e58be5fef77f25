"""Logits in fp32 of 16-bit models: what goes back through them is multiplied in 16 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.models.layers import wide_dot_general
from tests.models.test_calls import CONFIGS, IDS

ALONG = (((2,), (1,)), ((), ()))
KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (2, 5, 8), jnp.bfloat16)
TABLE = jax.random.normal(KEYS[1], (50, 8), jnp.bfloat16)
G = jax.random.normal(KEYS[2], (2, 5, 50))


def operands(jaxpr, size):
    """The types that each product of a program multiplies in which an axis has that size, those of
    programs in it too.
    """
    found = set()
    for eqn in jaxpr.eqns:
        product = eqn.primitive.name == "dot_general"
        if product and any(size in v.aval.shape for v in eqn.invars):
            found.add(tuple(str(v.aval.dtype) for v in eqn.invars))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found |= operands(inner, size) if hasattr(inner, "eqns") else set()
    return found


def plain(x, table):
    return jax.lax.dot_general(x, table, ALONG, preferred_element_type=jnp.float32)


def test_the_product_is_the_wide_one_and_its_gradients_are_rounded_once():
    y, pullback = jax.vjp(lambda x, t: wide_dot_general(x, t, ALONG), X, TABLE)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, plain(X, TABLE))
    rounded = G.astype(jnp.bfloat16)
    for got, want in zip(
        pullback(G), jax.vjp(plain, X, TABLE)[1](rounded.astype(float)), strict=True
    ):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, want)), rtol=1e-2)


def test_derivatives_along_a_direction_and_one_operand_alone():
    def of(x):
        return wide_dot_general(x, TABLE, ALONG)

    _, move = jax.jvp(of, (X,), (X,))
    np.testing.assert_allclose(move, plain(X, TABLE), rtol=1e-2, atol=1e-2)
    # Nothing is multiplied for the operand that does not move.
    moved = jax.make_jaxpr(lambda x: jax.jvp(of, (x,), (x,)))(X)
    assert str(moved).count("dot_general[") == 2
    by_row = jax.vmap(lambda x: wide_dot_general(x[None], TABLE, ALONG)[0])(X)
    np.testing.assert_array_equal(by_row, plain(X, TABLE))


def test_fp32_is_a_plain_product():
    wide = [x.astype(jnp.float32) for x in (X, TABLE)]
    got = jax.make_jaxpr(lambda x, t: wide_dot_general(x, t, ALONG))(*wide)
    assert [eqn.primitive.name for eqn in got.eqns] == ["dot_general"]


def loss_of(kind, **options):
    build, config = CONFIGS[kind]
    model = build(
        dataclasses.replace(config, **options), rngs=nnx.Rngs(0),
        dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
    )  # fmt: skip
    apply, params = jpeft.functional(model)
    more = {"decoder_input_ids": IDS} if kind == "t5" else {}

    def loss(params):
        total, count = jpeft.lift(apply)(params, IDS, labels=IDS, chunk=4, **more)
        return total / count

    return loss, params


CASES = [("gpt2", {}), *((k, {"tie_word_embeddings": t}) for k in ("llama", "t5") for t in (1, 0))]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_no_model_multiplies_wide_numbers_going_back(kind, options):
    loss, params = loss_of(kind, **{k: bool(v) for k, v in options.items()})
    words = CONFIGS[kind][1].vocab_size
    found = operands(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, words)
    assert found == {("bfloat16", "bfloat16")}


def test_a_low_rank_head_has_its_gradients_without_a_dense_one():
    loss, params = loss_of("llama", tie_word_embeddings=False)
    method = jpeft.LoRA(2, 4.0, r"lm_head/kernel$")
    state = method.init(KEYS[0], params)
    state = jax.tree.map(lambda x: jax.random.normal(KEYS[1], x.shape, x.dtype), state)

    def of(state, read=lambda rewritten: rewritten):
        return loss(read(method.rewrite(params, state)))

    dense = params["lm_head"]["kernel"].shape
    got = jax.make_jaxpr(jax.grad(of))(state)
    assert dense not in {v.aval.shape for v in got.jaxpr.outvars}
    made, merged = (
        jax.tree.leaves(jax.grad(lambda s, r=r: of(s, r))(state))
        for r in (lambda x: x, jpeft.merge)
    )
    for g, h in zip(made, merged, strict=True):
        assert np.any(g)
        np.testing.assert_allclose(g, h, atol=0.05 * float(jnp.abs(h).max()))
