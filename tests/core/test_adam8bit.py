"""Adam with 8-bit moments beside a plain reference, optax's Adam, bitsandbytes and other meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.adam8bit import Layout, adamw8bit, dequantised, quantised, scale_by_adam8bit
from jpeft.dynamic_map import dynamic_map
from jpeft.models.llama import AXES, Llama, LlamaConfig
from sharding import Zero, axes_by_pattern, make_mesh, make_step

B1, B2, EPS = 0.9, 0.99, 1e-8
BOTH = (True, False)  # signs
SHAPES = {
    "matrix": (40, 300),
    "tall": (513, 9),
    "vector": (5000,),
    "layers": {"kernel": (3, 70, 40)},
    "small": (10, 10),
    "conv": (2, 300, 8),
}


def tree(seed, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(seed), 99))

    def of(shape):
        size = 10 ** jax.random.uniform(next(keys), shape, minval=-5)
        return (size * jax.random.normal(next(keys), shape)).astype(dtype)

    return jax.tree.map(of, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


# -- the reference: one block after another, in numpy -------------------------------------------


def blocks_of(shape):
    """The indices of every block of an array: rows along the largest axis, cut at 256."""
    axis = max(range(len(shape)), key=lambda i: (shape[i], i))
    indices = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, -1)
    for row in indices.reshape(-1, shape[axis]):
        for start in range(0, shape[axis], 256):
            yield row[start : start + 256]


def coded(x, signed):
    """Codes, and what they stand for."""
    values = dynamic_map(signed)
    codes, wide = np.zeros(x.size, np.uint8), np.zeros(x.size, np.float32)
    for block in blocks_of(x.shape):
        scale = np.abs(x.reshape(-1)[block]).max()
        relative = x.reshape(-1)[block] / (scale or 1)
        codes[block] = np.abs(relative[:, None] - values).argmin(1)
        if not signed:
            codes[block] = np.maximum(codes[block], relative > 0)
        wide[block] = values[codes[block]] * scale
    return codes.reshape(x.shape), wide.reshape(x.shape)


def reference(count, grad, m, v):
    """Updates and moments, all fp32."""
    m = B1 * m + (1 - B1) * grad
    v = B2 * v + (1 - B2) * grad**2
    return m / (1 - B1**count) / (np.sqrt(v / (1 - B2**count)) + EPS), m, v


def layers_apart(x):
    """Stacked layers as a list of layers."""
    return list(x) if x.ndim == 3 and x.shape[0] == 3 else [x]


@pytest.mark.parametrize("compiled", [True, False])
def test_it_is_the_reference(compiled):
    """Each step from the same state: codes are equal but where rounding decides."""
    optimiser = scale_by_adam8bit(B1, B2, EPS)
    update = jax.jit(optimiser.update) if compiled else optimiser.update
    state = optimiser.init(tree(0))
    wide = [[(np.zeros(x.shape, np.float32),) * 2 for x in layers_apart(g)]
            for g in jax.tree.leaves(tree(0))]  # fmt: skip
    for count in range(1, 5):
        grads = tree(count)
        updates, state = update(grads, state)
        trees = (grads, updates, state.mu, state.nu)
        for i, leaves in enumerate(zip(*map(jax.tree.leaves, trees), strict=True)):
            parts = zip(*(layers_apart(np.asarray(x)) for x in leaves), strict=True)
            for j, (g, u, m, v) in enumerate(parts):
                want, want_m, want_v = reference(count, g, *wide[i][j])
                np.testing.assert_allclose(u, want, rtol=2e-5, atol=1e-7)
                if m.dtype == np.float32:  # a small one
                    np.testing.assert_allclose(m, want_m, rtol=1e-5, atol=1e-12)
                    np.testing.assert_allclose(v, want_v, rtol=1e-5, atol=1e-12)
                    wide[i][j] = m, v
                    continue
                now = []
                for got, exact, signed in ((m, want_m, True), (v, want_v, False)):
                    codes, _ = coded(exact, signed)
                    away = got.astype(int) - codes
                    assert np.abs(away).max() <= 1
                    assert np.mean(away != 0) < 1e-3
                    scales = np.zeros(exact.size, np.float32)
                    for block in blocks_of(exact.shape):
                        scales[block] = np.abs(exact.reshape(-1)[block]).max()
                    now.append(dynamic_map(signed)[got] * scales.reshape(exact.shape))
                wide[i][j] = tuple(now)


@pytest.mark.parametrize("shape", [(3000,), (40, 512), (512, 40), (4, 512, 33), (1, 5), (1,)])
@pytest.mark.parametrize("layout", [Layout(), Layout(64), Layout(256, shards=8), Layout(1)])
def test_there_and_back(shape, layout):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    @jax.jit
    def run(x):
        coded = {signed: quantised(x if signed else jnp.abs(x), signed, layout) for signed in BOTH}
        return {signed: (*c, dequantised(*c, signed, layout)) for signed, c in coded.items()}

    for signed, results in run(x).items():
        codes, scales, got = map(np.asarray, results)
        want = x if signed else np.abs(x)
        assert codes.shape == shape
        axis, parts, size = layout.of(shape)
        n = shape[axis] // parts
        assert scales.shape[axis] == parts * -(-n // size)
        # Half of the widest gap between the map's values, in the block's largest.
        gap = np.diff(dynamic_map(signed)).max() / 2
        assert np.abs(got - want).max() <= (gap + 1e-6) * scales.max()
        np.testing.assert_allclose(np.abs(got).max(axis), np.abs(want).max(axis), rtol=0.01)


def test_blocks_end_where_shards_do():
    assert Layout(256).of((3, 14336)) == (1, 1, 256)
    assert Layout(256, shards=64).of((3, 14336)) == (1, 64, 224)
    assert Layout(256, shards=64).of((512, 512)) == (1, 1, 256)  # 8 a part would be too few
    x = jax.random.normal(jax.random.key(1), (5, 1024))
    whole = quantised(x, True, Layout(256, shards=8))
    parts = [quantised(part, True, Layout(128)) for part in jnp.split(x, 8, axis=1)]
    for got, want in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(got, jnp.concatenate(want, axis=1))


def test_zeros_and_what_is_not_finite():
    zeros = jnp.zeros((2, 4096))
    codes, scales = quantised(zeros, True, Layout())
    np.testing.assert_array_equal(dequantised(codes, scales, True, Layout()), zeros)
    # One that is no number leaves its block without numbers: nothing hides it.
    bad = zeros.at[1, 300].set(jnp.nan)
    got = dequantised(*quantised(bad, True, Layout()), True, Layout())
    assert not bool(jnp.isfinite(got[1, 256:512]).any())
    assert bool(jnp.isfinite(got[0]).all())


def test_two_bytes_a_parameter():
    params = {"w": jnp.zeros((512, 1024), jnp.bfloat16), "layers": {"k": jnp.zeros((4, 256, 512))}}
    state = adamw8bit(1e-3).init(params)
    own = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held - 4 == own * (2 + 8 / 256)  # a count; two codes, and two scales a block
    full = sum(x.nbytes for x in jax.tree.leaves(optax.adamw(1e-3).init(jpeft.cast(params, "f4"))))
    assert full - 4 == 8 * own


def test_small_parameters_are_optax_adam():
    params = {"a": jnp.ones((10, 20)), "b": jnp.ones(7)}
    plain, ours = optax.scale_by_adam(B1, B2, EPS), scale_by_adam8bit(B1, B2, EPS)
    one, two = plain.init(params), ours.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jax.random.normal(jax.random.key(i), p.shape), params)
        want, one = plain.update(grads, one)
        got, two = ours.update(grads, two)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)
    assert {x.dtype for x in jax.tree.leaves(two.mu)} == {jnp.dtype("float32")}


def test_bf16_gradients_jit_and_donation():
    params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
    optimiser = jpeft.master_weights(adamw8bit(1e-2))
    state = optimiser.init(params)
    before = jax.tree.leaves(state)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 2))(params)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, state = step(params, state)
    assert all(x.is_deleted() for x in before)
    assert new["w"].dtype == jnp.bfloat16
    assert state.inner[0].mu["w"].dtype == jnp.uint8
    np.testing.assert_allclose(new["w"].astype(jnp.float32), 0.99, rtol=0.004)
    step(new, state)  # and again


def test_parts_of_a_tree_are_masked():
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones((64, 128))}
    optimiser = optax.masked(scale_by_adam8bit(), {"w": True, "b": False})
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimiser.update(grads, optimiser.init(params))
    np.testing.assert_array_equal(updates["b"], grads["b"])
    np.testing.assert_allclose(updates["w"], 1, rtol=1e-5)


def test_wrong_numbers_are_refused():
    for wrong in ({"block": 0}, {"shards": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            scale_by_adam8bit(**wrong)


# -- bitsandbytes --------------------------------------------------------------------------------


@pytest.mark.interop
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_are_bitsandbytes_blocks(signed):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    x = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    x = x if signed else np.abs(x)
    code = functional.create_dynamic_map(signed)
    theirs, state = functional.quantize_blockwise(torch.tensor(x), code=code, blocksize=256)
    codes, scales = quantised(jnp.asarray(x), signed, Layout(256))
    np.testing.assert_array_equal(scales.reshape(-1), state.absmax.numpy())
    # Its CPU code rounds to a grid of 16 bits before it looks for the nearest value.
    away = np.asarray(codes).astype(int) - theirs.numpy()
    assert np.mean(away != 0) < 0.005
    there = functional.dequantize_blockwise(torch.tensor(np.asarray(codes)), state).numpy()
    got = dequantised(codes, scales, signed, Layout(256))
    np.testing.assert_allclose(got, there, rtol=3e-7)


# -- what it is for: the losses of Adam ----------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
METHODS = {
    "full": jpeft.Train(r".*"),
    "lora": jpeft.LoRA(rank=16, alpha=32.0, targets=r"(q|v|up|down)_proj/kernel$"),
}
NAMES = axes_by_pattern(AXES)
EIGHT = functools.partial(adamw8bit, smallest=1024)


@functools.cache
def parts(method):
    """The loss, what is trained, what is frozen, and the batches."""
    apply, params = jpeft.functional(Llama(CONFIG, rngs=nnx.Rngs(0)))
    transform = METHODS[method]
    uses = jpeft.uses(apply, params, jnp.zeros((1, 8), jnp.int32))
    trainable = transform.init(jax.random.key(1), params, uses=uses)

    def loss(trainable, frozen, batch, key):
        rewritten = transform.rewrite(frozen, trainable)
        return jpeft.lift(apply)(rewritten, batch["ids"], labels=batch["ids"], chunk=64)

    rng = np.random.default_rng(2)
    first, by = rng.integers(0, 64, (60, 16, 1)), rng.integers(1, 3, (60, 16, 1))
    ids = ((first + by * np.arange(12)) % 64).astype(np.int32)  # counting by ones or by twos
    return loss, trainable, params, [{"ids": i} for i in ids]


@functools.cache
def losses(method, optimiser, stage=None, steps=60):
    loss, trainable, params, batches = parts(method)
    zero = None if stage is None else Zero(make_mesh(), stage, smallest=512)
    made = optimiser(3e-3) if stage is None else optimiser(3e-3, shards=8)
    step = make_step(loss, made, zero=zero, axes=NAMES, clip=1.0)
    state = step.init(trainable)
    if zero is not None:
        params = jax.device_put(params, zero.parameters(params, NAMES))
        codes = [x for x in jax.tree.leaves(state.optimiser) if x.dtype == jnp.uint8]
        assert codes
        assert all(x.addressable_shards[0].data.size == x.size // 8 for x in codes)
    out = []
    for i, batch in enumerate(batches[:steps]):
        state, metrics = step(state, params, batch, jax.random.key(i))
        out.append(float(metrics["loss"]))
    return np.asarray(out)


def of_one_run(*values):
    """A case whose run one worker makes, for all tests that look at it."""
    return pytest.param(*values, marks=pytest.mark.xdist_group(f"adam8bit {values[0]}"))


@pytest.mark.parametrize("method", [of_one_run("full"), of_one_run("lora")])
def test_a_language_model_learns_as_with_adamw(method):
    eight, plain = losses(method, EIGHT), losses(method, optax.adamw)
    assert plain[-5:].mean() < 0.8 * plain[0]
    assert eight[-5:].mean() == pytest.approx(plain[-5:].mean(), rel=0.03)


@pytest.mark.parametrize(("method", "stage"), [of_one_run("full", 3), of_one_run("lora", 1)])
def test_eight_devices_are_one(method, stage):
    one, eight = losses(method, EIGHT)[:20], losses(method, EIGHT, stage, 20)
    np.testing.assert_allclose(eight, one, rtol=0.01)


def regression(outputs, spread=2):
    """Inputs whose sizes spread over decades, and what is to come out."""
    normal = np.random.default_rng(0).standard_normal
    x = normal((512, 128)) * np.logspace(-spread, 0, 128)
    want = x @ normal((128, outputs)) + 0.1 * normal((512, outputs))
    return x.astype(np.float32), want.astype(np.float32)


STEPS = 200
SCHEDULE = optax.cosine_decay_schedule(0.1, STEPS)


def regressed(optimiser, x, want):
    """The loss after all steps."""

    @jax.jit
    def run(x, want):
        def step(_, carry):
            w, state, _ = carry
            value, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w - want) ** 2))(w)
            updates, state = optimiser.update(grad, state, w)
            return optax.apply_updates(w, updates), state, value

        w = jnp.zeros((x.shape[1], want.shape[1]))
        start = w, optimiser.init(w), jnp.zeros(())
        return jax.lax.fori_loop(0, STEPS, step, start)[2]

    return float(run(x, want))


@pytest.mark.parametrize(
    ("outputs", "spread", "rel"),
    [(256, 0, 0.02), (256, 2, 0.02), (64, 0, 0.02), (64, 2, 0.15)],  # 64: blocks across all inputs
)
def test_a_regression_reaches_the_loss_of_adamw(outputs, spread, rel):
    problem = regression(outputs, spread)
    plain = regressed(optax.adamw(SCHEDULE), *problem)
    assert regressed(adamw8bit(SCHEDULE), *problem) == pytest.approx(plain, rel=rel)


@pytest.mark.interop
def test_bitsandbytes_reaches_it_too():
    torch = pytest.importorskip("torch")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    problem = regression(256)
    x, want = (torch.tensor(a) for a in problem)
    w = torch.nn.Parameter(torch.zeros(128, 256))
    theirs = bitsandbytes.optim.AdamW8bit([w], lr=0.1, weight_decay=1e-4)
    for i in range(STEPS):
        theirs.param_groups[0]["lr"] = float(SCHEDULE(i))
        loss = ((x @ w - want) ** 2).mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    assert theirs.state[w]["state1"].dtype == torch.uint8
    assert regressed(adamw8bit(SCHEDULE), *problem) == pytest.approx(loss.item(), rel=0.01)


def test_scalars_and_empty_arrays_keep_moments_in_fp32():
    params = {"scalar": jnp.float32(1), "empty": jnp.zeros((0, 4)), "vector": jnp.ones(4)}
    optimiser = scale_by_adam8bit(smallest=0)
    state = optimiser.init(params)
    updates, state = optimiser.update(params, state)
    assert state.mu["scalar"].dtype == state.mu["empty"].dtype == jnp.float32
    assert state.mu["vector"].dtype == jnp.uint8
    np.testing.assert_allclose(updates["scalar"], 1, rtol=1e-5)
    assert updates["empty"].shape == (0, 4)
