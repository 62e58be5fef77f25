"""Products of bf16 for a CPU, whether it has instructions for them or not: near those of fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._cpu_features import multiplies_bf16
from jpeft._cpu_products import turned

SHORT = jnp.bfloat16
METHODS = {
    "none": None,
    "train": jpeft.Train(r".*"),
    "lora": jpeft.LoRA(2, 4.0, r"kernel$"),
    "lora in bf16": jpeft.LoRA(2, 4.0, r"kernel$"),
    "lora on what is trained": jpeft.chain(jpeft.Train(r"kernel$"), jpeft.LoRA(2, 4.0, r"kernel$")),
    "adapter": jpeft.Adapter(5, r"kernel$"),
}


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


PARAMS = {
    "up": {"kernel": normal(0, (8, 32), SHORT), "bias": normal(1, (1, 1, 32), SHORT)},
    "down": {"kernel": normal(2, (4, 32), SHORT)},  # read turned
}


def model(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["down"]["kernel"].T


def distance(a, b):
    """The largest difference, as a part of the largest number."""
    flat = [np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(t)])
            for t in (a, b)]  # fmt: skip
    return np.abs(flat[0] - flat[1]).max() / np.abs(flat[1]).max()


def started(name):
    method, x = METHODS[name], normal(3, (6, 10, 8), SHORT)
    if method is None:
        return jpeft.Train(r"nothing|bias$"), {}, x
    uses = jpeft.uses(model, PARAMS, x)
    state = jax.tree.map(
        lambda v: v + 0.2 * normal(4, v.shape, v.dtype),
        method.init(jax.random.key(0), PARAMS, uses=uses),
    )
    return method, jpeft.cast(state, SHORT) if name == "lora in bf16" else state, x


def loss(method, state, x, dtype, **how):
    params, state = jpeft.cast(PARAMS, dtype), state
    rewritten = method.rewrite(params, state) if state else params
    if how:
        rewritten = jpeft.cpu_products(rewritten, params, **how)
    out = jpeft.lift(model)(rewritten, x.astype(dtype))
    return jnp.mean(jnp.square(out.astype(jnp.float32)))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_near_those_of_fp32(name, native):
    method, state, x = started(name)

    def graded(dtype, **how):
        def of(state, x):
            return loss(method, state, x, dtype, **how)

        return jax.jit(jax.value_and_grad(of, (0, 1)))(state, x)

    value, grads = graded(jnp.float32)
    found, made = graded(SHORT, bf16=native)
    assert abs(found - value) < 0.02 * abs(value)
    for a, b in zip(made, grads, strict=True):
        assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
        if jax.tree.leaves(a):
            assert distance(a, b) < 0.03
    assert {g.dtype for g in jax.tree.leaves(made)} == {
        g.dtype for g in jax.tree.leaves((state, x))
    }


@pytest.mark.parametrize("name", ["lora", "train", "adapter"])
def test_sums_are_in_fp32(name):
    method, state, x = started(name)
    text = str(
        jax.make_jaxpr(jax.grad(lambda s: loss(method, s, x, SHORT, bf16=True)))(state).jaxpr
    )
    products = [line for line in text.splitlines() if "= dot_general" in line]
    assert len(products) > 4
    assert not [line for line in products if ":bf16" in line.split("=")[0]]


@pytest.mark.parametrize("native", [False, True])
def test_factors_count_in_fp32(native):
    x, weight = normal(1, (40, 16), SHORT), normal(2, (40, 8))
    params, method = {"kernel": jnp.zeros((16, 8), SHORT)}, jpeft.LoRA(2, 4.0, "kernel")
    state = jax.tree.map(lambda v: normal(3, v.shape), method.init(jax.random.key(0), params))

    def total(state, params, x, **how):
        rewritten = method.rewrite(params, state)
        rewritten = jpeft.cpu_products(rewritten, params, **how) if how else rewritten
        y = jpeft.lift(lambda p, x: jnp.dot(x, p["kernel"], preferred_element_type=jnp.float32))
        return jnp.sum(weight.astype(SHORT).astype(jnp.float32) * y(rewritten, x))

    graded = jax.jit(jax.value_and_grad(lambda s: total(s, params, x, bf16=native)))
    long = jpeft.cast(params, jnp.float32), x.astype(jnp.float32)
    for a, b in zip(graded(state), jax.value_and_grad(total)(state, *long), strict=True):
        assert distance(a, b) < 3e-5  # bf16 tells 4e-3 apart


def test_a_bias_adds_up_in_fp32():
    # In bf16 a sum stands still at 256: a further 1 is less than half of the next step.
    params = {"kernel": jnp.zeros((4, 2), SHORT), "bias": jnp.zeros((1, 2), SHORT)}
    method, x = jpeft.Train("bias"), jnp.zeros((1000, 4), SHORT)
    state = method.init(jax.random.key(0), params)

    def total(state):
        rewritten = jpeft.cpu_products(method.rewrite(params, state), params)
        return jnp.sum(
            jpeft.lift(lambda p, x: x @ p["kernel"] + p["bias"])(rewritten, x).astype(jnp.float32)
        )

    (grad,) = jax.tree.leaves(jax.grad(total)(state))
    np.testing.assert_array_equal(grad.astype(np.float32), np.full((1, 2), 1000))


@pytest.mark.parametrize("barriers", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kernel", [(16, 24), (24, 16)])
def test_a_product_turned_round_by_what_is_around_it_runs(kernel, wide, barriers):
    """XLA for CPUs takes a transpose into a product of bf16 in fp32, and then cannot run it."""
    params = {"kernel": normal(0, kernel, SHORT)}
    x = normal(1, (16, 12) if kernel[0] == 16 else (12, 16), SHORT)
    out = jnp.float32 if wide else SHORT

    def around(p, x):
        if kernel[0] == 16:  # (k, n) turned into what it multiplies
            return jnp.dot(x.T, p["kernel"], preferred_element_type=out).T
        return jnp.dot(x, p["kernel"].T, preferred_element_type=out).T

    def run(params, x):
        made = jpeft.cpu_products(params, params, bf16=True)
        return jpeft.lift(around)(made, x)

    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if barriers else None
    found = jax.jit(run, compiler_options=options)(params, x)
    wanted = around({"kernel": params["kernel"].astype(jnp.float32)}, x.astype(jnp.float32))
    assert found.dtype == out
    assert distance(found, wanted) < 0.01
    graded = jax.jit(
        jax.grad(lambda x: jnp.sum(run(params, x).astype(jnp.float32) ** 2)),
        compiler_options=options,
    )(x)
    assert graded.dtype == SHORT
    assert np.isfinite(graded.astype(np.float32)).all()


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 64])
def test_turned_is_the_transpose(rows):
    x = normal(0, (rows, 5))
    np.testing.assert_array_equal(turned(x), x.T)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("model name : X\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", True),
        ("flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("flags\t\t: fpu avx512f avx512vl\nbugs\t\t: avx512_bf16\n", False),
        ("", False),
    ],
)
def test_what_a_processor_says_of_itself(tmp_path, text, has):
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    assert multiplies_bf16(info) is has


def test_a_system_that_says_nothing_has_none(tmp_path):
    assert multiplies_bf16(tmp_path / "none") is False
