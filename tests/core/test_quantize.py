"""Quantised weights: their numbers, and every method on them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft import nibbles
from tests.core import zoo
from tests.core.test_methods import METHODS, check_close, inputs, trained

WEIGHTS = r"(query|key|value|out|up|down)/(kernel|weight)$"
FORMATS = {
    "nf4": jpeft.Quantize(WEIGHTS, block=4),
    "fp4": jpeft.Quantize(WEIGHTS, "fp4", block=2, double=False),
    "int8": jpeft.Quantize(WEIGHTS, "int8"),
}
# Those whose leaves stand otherwise on what they rewrite.
ON_IT = ("lora", "parts", "dora", "ia3", "houlsby", "adapter on a kernel", "prefix by a network")
ON_IT += ("ia3 over lora", "adapter over lora", "prompt, prefix and lora")
make = functools.cache(zoo.make)


@functools.cache
def bases(form, model):
    """The quantised tree, and the dense one that it stands for."""
    model = make(model)

    @jax.jit
    def both(params):
        quantised = FORMATS[form](params, uses=model.uses)
        return quantised, jpeft.dequantize(quantised)

    return both(model.params)


@functools.cache
def plain(model):
    """What the model gives as it is."""
    return jax.jit(make(model).apply)(make(model).params, zoo.IDS)


def normal(*shape, key=0):
    return jnp.asarray(np.random.default_rng(key).standard_normal(shape), jnp.float32)


# -- numbers -----------------------------------------------------------------------------------


def test_the_errors_of_a_normal_are_the_known_ones():
    w = {"w": normal(1024, 1024)}
    plain = jpeft.quantization_error(w, jpeft.Quantize("w", double=False)(w))["w"]
    assert plain.absolute == pytest.approx(0.0728, abs=2e-4)
    assert plain.relative == pytest.approx(0.2034, abs=1e-3)
    assert plain.bits == 4.5
    double = jpeft.quantization_error(w, jpeft.Quantize("w")(w))["w"]
    assert double.absolute < 0.0735
    assert double.relative < 0.205
    assert double.bits == pytest.approx(4.127, abs=1e-3)
    fp4 = jpeft.quantization_error(w, jpeft.Quantize("w", "fp4")(w))["w"]
    assert fp4.absolute > 1.2 * double.absolute
    int8 = jpeft.quantization_error(w, jpeft.Quantize("w", "int8")(w))["w"]
    assert int8.absolute < 0.01


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_codes_are_nearest_and_their_numbers_stay(table):
    x = jnp.linspace(-1, 1, 4001)
    values = np.asarray(nibbles.values(jnp.arange(16, dtype=jnp.uint8), table))
    np.testing.assert_array_equal(values, np.asarray(nibbles.TABLES[table], np.float32))
    found = values[np.asarray(nibbles.nearest(x, table))]
    least = np.abs(np.asarray(x)[:, None] - values).min(1)
    np.testing.assert_allclose(np.abs(found - np.asarray(x)), least, atol=1e-7)
    codes = nibbles.nearest(jnp.asarray(values), table)
    np.testing.assert_array_equal(nibbles.values(codes, table), values)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.sampled_from([2, 4, 8]),
    st.sampled_from(["nf4", "fp4", "int8"]), st.booleans(),
)  # fmt: skip
def test_any_shape(inputs, outputs, layers, block, form, double):
    stack = (layers,) if layers else ()
    w = normal(*stack, inputs, outputs)
    axes = {"w": "b" * len(stack) + "io"}

    @jax.jit  # one program, where the operations alone would be many
    def run(w):
        leaf = jpeft.Quantize("w", form, block, double, axes)({"w": w})["w"]
        dense = leaf.materialise()
        assert leaf.shape == dense.shape == w.shape
        assert dense.dtype == w.dtype
        alone = [
            jpeft.Quantize("w", form, block, double)({"w": w[i]})["w"].materialise()
            for i in range(layers)
        ]
        again = jpeft.Quantize("w", form, block, False, axes)({"w": dense})["w"].materialise()
        return dense, alone, again

    dense, alone, again = run(w)
    for i in range(layers):
        np.testing.assert_array_equal(alone[i], dense[i])
    # Half the widest gap between entries of a table, of the largest number of a block.
    worst = {"nf4": 0.16, "fp4": 0.17, "int8": 0.004}[form] + (0.05 if double else 0)
    reach = np.abs(w).max()
    assert np.abs(dense - w).max() <= worst * reach + 1e-6
    if not double:
        np.testing.assert_allclose(again, dense, rtol=1e-5, atol=1e-6)


def test_zeros_and_a_single_large_number():
    w = jnp.zeros((128, 3)).at[5, 1].set(1e30)
    for form in ("nf4", "fp4", "int8"):
        for double in (True, False):
            dense = jpeft.Quantize("w", form, double=double)({"w": w})["w"].materialise()
            assert np.isfinite(dense).all()
        np.testing.assert_allclose(dense[5, 1], 1e30, rtol=1e-5)
        np.testing.assert_array_equal(dense[:, 0], 0)


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_a_cast_keeps_codes_and_scales(form, double):
    params = {"w": normal(128, 8)}
    quantised = jpeft.Quantize("w", form, double=double)(params)
    cast = jpeft.cast({"layer": quantised}, jnp.bfloat16)["layer"]
    assert cast["w"].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(cast), jax.tree.leaves(quantised), strict=True):
        assert a is b
    want = quantised["w"].materialise().astype(jnp.bfloat16)
    np.testing.assert_array_equal(cast["w"].materialise(), want)
    kept = jpeft.cast(quantised, jnp.bfloat16, keep="w$")
    assert kept["w"].dtype == jnp.float32
    lora = jpeft.LoRA(2, 4.0, "w$")
    rewritten = lora.rewrite(quantised, lora.init(jax.random.key(0), quantised))
    x = normal(3, 128, key=1)
    out = jpeft.Policy()(jpeft.lift(lambda p, x: x @ p["w"]))(rewritten, x)
    np.testing.assert_allclose(out, x @ want.astype(jnp.float32), rtol=0.05, atol=0.1)
    assert out.dtype == jnp.float32


# -- every method on a quantised base ------------------------------------------------------------


def pairs():
    for name in ON_IT:
        yield name, "nf4", "scanned"
    for model in zoo.MAKERS:
        for form in FORMATS:
            yield "lora", form, model
    for name in ("ia3", "dora"):
        yield name, "int8", "nnx"


@pytest.mark.parametrize(("name", "form", "model"), sorted(set(pairs())))
def test_a_method_is_what_it_is_on_the_dense_weights(name, form, model):
    quantised, dense = bases(form, model)
    method, unchanged, model = METHODS[name], plain(model), make(model)
    state, x = trained(method, model), inputs(method)
    forward = jpeft.lift(model.apply)

    def loss(state, params):
        out = forward(method.transform.rewrite(params, state), x)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, ours), gradient = run(state, quantised)
    (_, theirs), wanted = run(state, dense)
    check_close(ours, theirs)
    check_close(gradient, wanted)
    assert np.abs(ours - unchanged).max() > 1e-3
    start = jax.eval_shape(
        lambda params: method.transform.init(jax.random.key(0), params, uses=model.uses), quantised
    )
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, state)
    if method.merges:
        merged = jax.jit(lambda p, s: jpeft.merge(method.transform.rewrite(p, s)))(quantised, state)
        assert jax.tree.structure(merged) == jax.tree.structure(model.params)
        check_close(jax.jit(model.apply)(merged, x), ours, 1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_bf16(form):
    model = make("scanned")
    params = jpeft.cast(model.params, jnp.bfloat16)

    @jax.jit
    def both(params):
        quantised = FORMATS[form](params, uses=model.uses)
        dense = jpeft.dequantize(quantised)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(dense))
        exact = model.apply(jpeft.cast(dense, jnp.float32), zoo.IDS)
        return jpeft.lift(model.apply)(quantised, zoo.IDS), exact

    out, exact = both(params)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1, rtol=0.05)


def test_many_tasks_in_one_batch():
    quantised, _ = bases("nf4", "scanned")
    method, model = METHODS["lora"], make("scanned")
    states = [trained(method, model, seed=s) for s in (1, 2)]
    forward, rewrite = jpeft.lift(model.apply), method.transform.rewrite
    task = jnp.array([1, 0, -1])
    out = forward(rewrite(quantised, jpeft.stack(states), task=task), zoo.IDS)
    for row, tree in enumerate((rewrite(quantised, states[1]), rewrite(quantised, states[0]))):
        check_close(out[row], forward(tree, zoo.IDS)[row], 1e-4)
    check_close(out[2], forward(quantised, zoo.IDS)[2], 1e-4)


def test_vmap_over_quantised_weights():
    w, x = normal(3, 8, 6), normal(3, 5, 8, key=1)
    leaf = jpeft.Quantize("w", block=4, axes={"w": "bio"})({"w": w})
    out = jax.vmap(jpeft.lift(lambda p, x: x @ p["w"]))(leaf, x)
    np.testing.assert_allclose(out, x @ leaf["w"].materialise(), rtol=1e-5, atol=1e-5)


# -- the same weight, arranged otherwise -----------------------------------------------------------

W = normal(2, 16, 24)
ARRANGED = {
    "indexed": lambda w, x: x @ w[1],
    "sliced": lambda w, x: x @ w[1:].reshape(16, 24),
    "dynamic": lambda w, x: x @ jax.lax.dynamic_index_in_dim(w, x.shape[0] - 2, keepdims=False),
    "transposed": lambda w, x: jnp.einsum("ti,oi->to", x, w.transpose(0, 2, 1)[1]),
    "split": lambda w, x: jnp.einsum("ti,inh->tnh", x, w[1].reshape(16, 4, 6)),
    "part of the outputs": lambda w, x: x @ w[1][:, 3:9],
    "part of the inputs": lambda w, x: x[:, :8] @ w[1][:8],
    "with an axis of one": lambda w, x: jnp.einsum("ti,zio->to", x, w[1][None]),
    "both joined": lambda w, x: x.sum() * w.reshape(32, 24),
    "cast": lambda w, x: x.astype(jnp.bfloat16) @ w[1].astype(jnp.bfloat16),
    "added": lambda w, x: x @ (w[1] + 1),
    "from the left": lambda w, x: w[1].T @ x.T,
    "backwards": lambda w, x: (x @ w[1]) @ w[1].T,
}


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("how", ARRANGED)
def test_what_models_do_to_a_weight(form, how):
    quantise = jpeft.Quantize("w", form, 4, axes={"w": "bio"})
    params, x, run = quantise({"w": W}), normal(3, 16, key=2), ARRANGED[how]
    forward = jpeft.lift(lambda p, x: run(p["w"], x))
    dense = jpeft.dequantize(params)
    both = jax.jit(lambda p, x: jax.vjp(lambda x: forward(p, x), x)[1](forward(p, x)))
    ours, theirs = both(params, x), both(dense, x)
    tolerance = 0.05 if how == "cast" else 1e-4
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance, atol=tolerance * 30)


def test_a_kernel_of_three_axes_and_a_convolution():
    q, x = normal(8, 4, 6), normal(3, 8, key=1)

    def heads(p, x):
        return jnp.einsum("td,dnh->tnh", x, p["q"])

    params = {"q": q}
    leaf = jpeft.Quantize("q", block=4)(params, uses=jpeft.uses(heads, params, x))
    assert leaf["q"].blocked == -3
    dense = jax.jit(lambda p, x: heads(jpeft.dequantize(p), x))(leaf, x)
    np.testing.assert_allclose(jax.jit(jpeft.lift(heads))(leaf, x), dense, atol=1e-5)

    def convolved(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=numbers)

    params, x = {"k": normal(3, 8, 5)}, normal(2, 7, 8, key=1)
    uses = jpeft.uses(convolved, params, x)
    for form in ("nf4", "int8"):
        leaf = jpeft.Quantize("k", form, block=4)(params, uses=uses)
        dense = jax.jit(lambda p, x: convolved(jpeft.dequantize(p), x))(leaf, x)
        np.testing.assert_allclose(jax.jit(jpeft.lift(convolved))(leaf, x), dense, atol=1e-5)


def test_products_in_integers():
    w, x = normal(64, 24), normal(5, 64, key=1).at[:, 7].mul(40)
    params = jpeft.Quantize("w", "int8", outliers=4)({"w": w})
    forward = jpeft.lift(lambda p, x: x @ p["w"])
    dense = x @ jpeft.dequantize(params)["w"]
    error = np.abs(jax.jit(forward)(params, x) - dense).max() / np.abs(dense).max()
    assert 0 < error < 0.01
    # Without a column of its own, one large input leaves the others a few of the 8 bits.
    small = x.at[:, 7].set(0)
    lost = dataclasses.replace(params["w"], outliers=1)
    big = forward({"w": lost}, x.at[:, 9].mul(50)) - x.at[:, 9].mul(50) @ lost.materialise()
    assert np.abs(big).max() > 3 * np.abs(forward(params, x) - dense).max()
    gradient = jax.grad(lambda x: (forward(params, x) * small[:, :24]).sum())(x)
    wanted = small[:, :24] @ jpeft.dequantize(params)["w"].T
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)
    turned = jpeft.lift(lambda p, x: jnp.einsum("io,ti->ot", p["w"], x))(params, x)
    np.testing.assert_allclose(turned, forward(params, x).T, rtol=1e-5)


def test_an_empty_batch_has_an_empty_product():
    params = jpeft.Quantize("w", "int8", outliers=4)({"w": normal(64, 24)})
    forward = jpeft.lift(lambda p, x: x @ p["w"])
    assert forward(params, jnp.ones((0, 64))).shape == (0, 24)
    gradient = jax.grad(lambda x: forward(params, x).sum())(jnp.ones((2, 0, 64)))
    assert gradient.shape == (2, 0, 64)


# -- memory ----------------------------------------------------------------------------------------


def test_the_backward_pass_keeps_codes_alone():
    w = normal(6, 256, 256)
    params = jpeft.Quantize("w", axes={"w": "bio"})({"w": w})
    a = jnp.zeros((6, 256, 2))

    def loss(a, params, x):
        def layer(x, layer):
            return jnp.tanh(x @ layer["w"] + (x @ layer["a"]) @ layer["a"].T), None

        return jax.lax.scan(layer, x, {**params, "a": a})[0].sum()

    step = jax.jit(jax.grad(jpeft.lift(loss)))
    used = [
        step.lower(a, p, jnp.ones((8, 256))).compile().memory_analysis().temp_size_in_bytes
        for p in (params, {"w": w})
    ]
    # Dense weights are arguments; of the quantised ones two at a time are dense, not six.
    assert used[0] < used[1] + 3 * w[0].nbytes


# -- files, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form, tmp_path):
    quantised, _ = bases(form, "nnx")
    model = make("nnx")
    jpeft.save(tmp_path / "base.safetensors", quantised)
    like = jax.eval_shape(lambda p: FORMATS[form](p, uses=model.uses), model.params)
    back = jpeft.load(tmp_path / "base.safetensors", like)
    assert jax.tree.structure(back) == jax.tree.structure(quantised)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(quantised), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def refused(message, quantise, params, error=jpeft.TargetError, **options):
    with pytest.raises(error, match=re.escape(message)):
        quantise(params, **options)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_quantised_is_refused():
    params = {"w": normal(8, 8), "n": jnp.ones(8), "ids": jnp.ones((8, 8), jnp.int32)}
    refused("matches no parameter; the nearest are: 'w'", jpeft.Quantize("ww$"), params)
    refused("needs a matrix", jpeft.Quantize("n$"), params)
    refused("only real numbers are quantised", jpeft.Quantize("ids"), params)
    refused("was already rewritten (Quantized)", jpeft.Quantize("w"), jpeft.Quantize("w")(params))
    refused("which axes are its inputs", jpeft.Quantize("w"), {"w": normal(2, 8, 8)})
    refused("table of embeddings", jpeft.Quantize("e"), {"embedding": normal(8, 8)})
    refused("nf4, fp4 and int8; got 'nf3'", lambda f: jpeft.Quantize("w", f), "nf3", ValueError)
    refused("int8 leaves", lambda n: jpeft.Quantize("w", outliers=n), 3, ValueError)
    refused("even number", lambda b: jpeft.Quantize("w", block=b), 3, ValueError)


@pytest.mark.parametrize("transform", [jpeft.Train("w"), jpeft.Subspace(3, "w")])
def test_a_quantised_weight_is_not_trained(transform):
    quantised = jpeft.Quantize("w", block=4)({"w": normal(8, 8)})
    with pytest.raises(jpeft.TargetError, match="'w' (is quantised|was already rewritten)"):
        transform.init(jax.random.key(0), quantised)
