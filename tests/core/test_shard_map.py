"""Leaves in a `shard_map`: every device has its part of what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jpeft

P = PartitionSpec
PARAMS = {"w": jax.random.normal(jax.random.key(1), (16, 160)), "bias": jnp.ones(160)}
X = jax.random.normal(jax.random.key(2), (4, 16))
SPECS = {
    "in": ((P("d", None), P(None, "d")), P()),
    "out": ((P(None, "d"), P()), P(None, "d")),
    "batch": ((P(), P("d")), P("d")),
}


def mesh():
    """Two devices."""
    return jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))


def sharded(how):
    """`x @ w + bias`, with the product in a `shard_map`."""
    specs, out = SPECS[how]

    def body(w, x):
        return jax.lax.psum(x @ w, "d") if how == "in" else x @ w

    def apply(params, x):
        product = jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=out)
        return product(params["w"], x) + params["bias"]

    return jax.jit(jpeft.lift(apply))


def plain(params, x):
    return x @ params["w"] + params["bias"]


def drawn(method, params):
    state = method.init(jax.random.key(3), params)
    return jax.tree.map(lambda x: x + 0.3, state)


@pytest.mark.parametrize("how", SPECS)
@pytest.mark.parametrize("block", [None, 4, 8])
@pytest.mark.parametrize("double", [False, True])
def test_lora_on_a_quantised_weight(how, block, double):
    base = PARAMS if block is None else jpeft.Quantize("w$", block=block, double=double)(PARAMS)
    lora = jpeft.LoRA(2, 4.0, "w$")
    rewritten = lora.rewrite(base, drawn(lora, base))
    want = plain(jpeft.merge(rewritten), X)
    np.testing.assert_allclose(sharded(how)(rewritten, X), want, rtol=1e-4, atol=1e-4)


def test_blocks_are_not_split():
    base = jpeft.Quantize("w$", block=16)(PARAMS)
    with pytest.raises(jpeft.LeafError, match="'w' is quantised in blocks of 16, and .* 2 parts"):
        sharded("in")(base, X)


@pytest.mark.parametrize("double", [False, True])
def test_experts_and_layers_of_their_own_on_every_device(double):
    params = {"w": jax.random.normal(jax.random.key(1), (2, 2, 16, 160))}
    base = jpeft.Quantize("w$", block=8, double=double, axes={"w$": "bbio"})(params)

    def apply(params, x):
        def body(w, x):
            return jnp.einsum("bei,leio->beo", x, w)

        experts = jax.shard_map(
            body, mesh=mesh(), in_specs=(P(None, "d"), P(None, "d")), out_specs=P(None, "d")
        )
        return experts(params["w"], x)

    x = jnp.stack([X, 2 * X], 1)
    want = apply(jpeft.dequantize(base), x)
    np.testing.assert_allclose(jpeft.lift(apply)(base, x), want, rtol=1e-4, atol=1e-4)


METHODS = {
    "adapter": jpeft.Adapter(2, "w$"),
    "parallel": jpeft.parallel_adapter(2, "w$"),
    "prefix": jpeft.PrefixTuning(2, "w$"),
}


@pytest.mark.parametrize("how", ["in", "out"])
@pytest.mark.parametrize("method", METHODS)
def test_what_acts_on_a_whole_result_is_not_split(method, how):
    rewritten = METHODS[method].rewrite(PARAMS, drawn(METHODS[method], PARAMS))
    with pytest.raises(jpeft.LeafError, match="at 'w' acts on all that the parameter produces"):
        sharded(how)(rewritten, X)


def test_an_adapter_on_a_part_of_a_bias_is_refused():
    adapter = jpeft.Adapter(2, "bias$")

    def apply(params, x):
        add = jax.shard_map(
            lambda y, b: y + b, mesh=mesh(), in_specs=(P(None, "d"), P("d")), out_specs=P(None, "d")
        )
        return add(x @ params["w"], params["bias"])

    rewritten = adapter.rewrite(PARAMS, drawn(adapter, PARAMS))
    with pytest.raises(jpeft.LeafError, match="at 'bias' .* into \\(2,\\) parts"):
        jpeft.lift(apply)(rewritten, X)


@pytest.mark.parametrize("how", SPECS)
def test_an_adapter_on_a_whole_bias_acts_on_the_sum(how):
    adapter = jpeft.Adapter(2, "bias$")
    rewritten = adapter.rewrite(PARAMS, drawn(adapter, PARAMS))
    want = jpeft.lift(plain)(rewritten, X)
    np.testing.assert_allclose(sharded(how)(rewritten, X), want, rtol=1e-4, atol=1e-3)


def test_an_adapter_on_a_kernel_acts_on_each_examples_result():
    adapter = METHODS["parallel"]
    rewritten = adapter.rewrite(PARAMS, drawn(adapter, PARAMS))
    want = jpeft.lift(plain)(rewritten, X)
    np.testing.assert_allclose(sharded("batch")(rewritten, X), want, rtol=1e-4, atol=1e-3)


def test_a_prompt_needs_the_whole_table():
    params = {"embedding": jnp.ones((6, 4))}
    prompt = jpeft.PromptTuning(2, "embedding$")

    def apply(params, ids):
        def body(table, ids):
            first = jax.lax.axis_index("d") * 3
            mine = (ids >= first) & (ids < first + 3)
            rows = jnp.where(mine[..., None], table[jnp.where(mine, ids - first, 0)], 0)
            return jax.lax.psum(rows, "d")

        return jax.shard_map(body, mesh=mesh(), in_specs=(P("d"), P()), out_specs=P())(
            params["embedding"], ids
        )

    rewritten = prompt.rewrite(params, prompt.init(jax.random.key(0), params))
    with pytest.raises(jpeft.LeafError, match="the prompt at 'embedding' stands beside the whole"):
        jpeft.lift(apply)(rewritten, jnp.arange(6))
