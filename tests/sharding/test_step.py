"""A step on eight devices is the step on one, at every stage, whole or in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.models.llama import AXES, Llama, LlamaConfig
from sharding import Zero, axes_by_pattern, make_mesh, make_step

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
METHODS = {
    "full": jpeft.Train(r".*"),
    "lora": jpeft.LoRA(rank=8, alpha=16.0, targets=r"(q|v|down)_proj/kernel$"),
}
NAMES = axes_by_pattern(AXES)


@functools.cache
def parts(method, remat=True):
    """The loss, what is trained, what is frozen, and twenty batches."""
    apply, params = jpeft.functional(Llama(CONFIG, rngs=nnx.Rngs(0), remat=remat))
    transform = METHODS[method]
    uses = jpeft.uses(apply, params, jnp.zeros((1, 8), jnp.int32))
    trainable = transform.init(jax.random.key(1), params, uses=uses)

    def loss(trainable, frozen, batch, key):
        rewritten = transform.rewrite(frozen, trainable)
        return jpeft.lift(apply)(rewritten, batch["ids"], labels=batch["labels"], chunk=64)

    rng = np.random.default_rng(2)
    first, by = rng.integers(0, 64, (20, 16, 1)), rng.integers(1, 3, (20, 16, 1))
    ids = ((first + by * np.arange(12)) % 64).astype(np.int32)  # counting by ones or by twos
    labels = np.where(rng.random(ids.shape) < 0.4, -100, ids).astype(np.int32)
    batches = [{"ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    return loss, trainable, params, batches


def run(method, zero, steps=20, **options):
    loss, trainable, params, batches = parts(method)
    step = make_step(loss, optax.adam(3e-3), zero=zero, axes=NAMES, clip=1.0, **options)
    state = step.init(trainable)
    if zero is not None:
        params = jax.device_put(params, zero.parameters(params, NAMES))
    losses = []
    for i, batch in enumerate(batches[:steps]):
        state, metrics = step(state, params, batch, jax.random.key(i))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@functools.cache
def alone(method):
    losses, state = run(method, None)
    return losses, jax.tree.map(np.asarray, state.trainable)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("stage", "shape", "accumulate"),
    [
        (0, None, 1),
        (1, None, 1),
        (2, None, 2),
        (3, None, 1),
        (3, "data=2,fsdp=2,tensor=2", 2),
    ],
)
def test_losses_are_one_devices(method, stage, shape, accumulate):
    zero = Zero(make_mesh(shape), stage, smallest=1)
    want, trained = alone(method)
    got, state = run(method, zero, accumulate=accumulate)
    assert want[-1] < want[0] - 0.03  # it learns
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    assert int(state.step) == 20
    assert int(state.skipped) == 0


def on_each(tree):
    """Bytes of a tree's arrays on each of the eight devices."""
    found = dict.fromkeys(range(8), 0)
    for x in jax.tree.leaves(tree):
        for s in x.addressable_shards:
            found[s.device.id] += s.data.nbytes
    return list(found.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_devices_hold_what_theory_says(method, stage):
    """An eighth of what the stage shares, all of the rest, on each of eight devices."""
    zero = Zero(make_mesh(), stage, smallest=1)
    _, state = run(method, zero, steps=1)  # as the compiled step leaves it
    for tree, shared in ((state.trainable, stage == 3), (state.optimiser, stage >= 1)):
        whole = sum(x.nbytes for x in jax.tree.leaves(tree))
        want = whole / 8 if shared else whole
        assert on_each(tree) == pytest.approx([want] * 8, rel=0.05)
    params = parts(method)[2]
    frozen = jax.device_put(params, zero.parameters(params, NAMES))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert on_each(frozen) == pytest.approx([whole / 8 if stage == 3 else whole] * 8, rel=0.05)


def test_parts_of_a_batch_weigh_by_their_tokens():
    """Rows with few labels beside rows with many: the mean is over tokens, not over parts."""
    whole, _ = run("lora", None, steps=3)
    split, _ = run("lora", None, steps=3, accumulate=4)
    np.testing.assert_allclose(split, whole, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_may_sum_to_less_than_one(accumulate):
    def loss(w, frozen, batch, key):
        return jnp.sum(batch * w), jnp.sum(batch)

    step = make_step(loss, optax.sgd(0.0), accumulate=accumulate)
    for weights, want in (([0.1, 0.3], 3.0), ([0.0, 0.0], 0.0)):
        _, metrics = step(step.init(jnp.float32(3)), None, jnp.asarray(weights))
        assert float(metrics["loss"]) == pytest.approx(want)
        assert float(metrics["grad_norm"]) == pytest.approx(want / 3)


def test_masters_are_of_what_was_given_and_not_of_its_rounding():
    start = {"w": jnp.asarray([1 + 2.0**-12, 3.0]), "n": jnp.arange(2)}
    step = make_step(
        lambda *_: jnp.float32(0), jpeft.master_weights(optax.sgd(1.0)), dtype=jnp.bfloat16
    )
    state = step.init(start)
    assert state.trainable["w"].dtype == jnp.bfloat16
    assert state.trainable["n"].dtype == start["n"].dtype
    np.testing.assert_array_equal(state.optimiser.masters["w"], start["w"])
    assert float(state.trainable["w"][0]) != float(start["w"][0])
    shapes = jax.eval_shape(lambda: start)
    assert jax.tree.map(lambda x: x.dtype, step.abstract(shapes)) == jax.tree.map(
        lambda x: x.dtype, state
    )


def simple(**options):
    def loss(w, frozen, batch, key):
        return jnp.mean((batch["x"] @ w - frozen) ** 2)

    step = make_step(loss, optax.sgd(0.1), **options)
    return step, step.init(jnp.ones(3)), {"x": jnp.eye(3) * 2.0}


def test_clipping_bounds_the_update():
    step, state, batch = simple(clip=0.01)
    state, metrics = step(state, jnp.float32(5), batch)
    assert float(metrics["grad_norm"]) > 1
    assert float(jnp.linalg.norm(state.trainable - 1)) == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_complex_gradients_are_summed_and_measured_whole(accumulate):
    def loss(w, frozen, batch, key):
        return jnp.mean(jnp.real(batch * w))

    step = make_step(loss, optax.sgd(1.0), accumulate=accumulate)
    state = step.init(jnp.zeros((), jnp.complex64))
    state, metrics = step(state, None, jnp.asarray([3 + 4j, 3 + 4j], jnp.complex64))
    assert complex(state.trainable) == -3 - 4j
    assert float(metrics["grad_norm"]) == pytest.approx(5)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    step, state, batch = simple()
    state, metrics = step(state, jnp.float32(jnp.nan), batch)
    assert np.array_equal(state.trainable, np.ones(3))
    assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (1, 1, 1.0)
    state, metrics = step(state, jnp.float32(5), batch)
    assert not np.array_equal(state.trainable, np.ones(3))
    assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (2, 1, 0.0)


def test_the_start_is_copied_and_the_state_donated():
    start = jnp.ones(3)
    step, _, batch = simple()
    state = step.init(start)
    after, _ = step(state, jnp.float32(0), batch)
    assert state.trainable.is_deleted()
    assert not start.is_deleted()
    assert not after.trainable.is_deleted()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="accumulate"):
        simple(accumulate=0)
    with pytest.raises(ValueError, match="clip"):
        simple(clip=0.0)
    step, state, batch = simple(accumulate=2)
    with pytest.raises(ValueError, match="'x' of the batch has 3 rows, .* taken in 2 equal parts"):
        step(state, jnp.float32(0), batch)
    step, state, _ = simple(accumulate=2, zero=Zero(make_mesh()))
    batch = {"x": jnp.ones((24, 3))}
    with pytest.raises(ValueError, match="'x' .* 24 rows, .* 8 devices .* evenly in 2 parts"):
        step.lower(state, jnp.float32(0), batch)


def test_what_keep_names_stays_and_a_wrong_name_is_told():
    params = {"table": {"embedding": jnp.ones((4, 2))}, "kernel": jnp.ones((2, 2))}

    def loss(trainable, frozen, batch, key):
        del frozen, key
        return jnp.sum(trainable["table"]["embedding"][batch] @ trainable["kernel"])

    def made(keep):
        return make_step(loss, optax.sgd(0.1), dtype=jnp.bfloat16, keep=keep)

    state = made(r"/embedding$").init(params).trainable
    assert state["table"]["embedding"].dtype == jnp.float32
    assert state["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"keep='embeding' matches none of the 2 trained paths"):
        made("embeding").init(params)
