"""An optimiser's state in the host's memory: the same numbers, and less of the device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from sharding import Checkpoints, Zero, fingerprint, make_mesh, make_step
from sharding.aot import compile_for, placed, topology
from sharding.layerwise import by_layers
from sharding.offload import HOST, offloaded

LAYERS, WIDTH = 4, 16
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "layers": {
        "a": jax.random.normal(KEYS[0], (LAYERS, WIDTH, WIDTH)),
        "b": jax.random.normal(KEYS[1], (LAYERS, WIDTH)),
    },
    "head": jax.random.normal(KEYS[2], (WIDTH, 3)),
}
ADAM = optax.adamw(optax.linear_schedule(1e-2, 0.0, 10))
MATRICES = optax.adamw(
    1e-2, weight_decay=0.5, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
)
OPTIMISERS = {
    "adamw": (ADAM, None),
    "decay of matrices": (MATRICES, None),
    "masters": (jpeft.master_weights(ADAM), jnp.bfloat16),
    "8 bits": (jpeft.adamw8bit(1e-2, smallest=64), None),
    "a norm over all": (optax.chain(optax.clip_by_global_norm(0.1), ADAM), None),
    "rounded at random": (jpeft.stochastic_rounding(ADAM, 0), jnp.bfloat16),
}


def loss(params, frozen, batch, key):
    x = batch
    for a, b in zip(params["layers"]["a"], params["layers"]["b"], strict=True):
        x = jnp.tanh(x @ a.astype(jnp.float32) / 4 + b.astype(jnp.float32))
    return jnp.mean((x @ params["head"].astype(jnp.float32) - 1) ** 2)


def run(optimiser, zero, dtype, steps=5, skip=None):
    step = make_step(loss, optimiser, zero=zero, clip=1.0, dtype=dtype)
    state, losses = step.init(PARAMS), []
    for i in range(steps):
        batch = jax.random.normal(jax.random.key(i), (8, WIDTH))
        batch = batch * jnp.nan if i == skip else batch
        state, metrics = step(state, None, batch, None)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_same_numbers(name, stage):
    optimiser, dtype = OPTIMISERS[name]
    zero = None if stage is None else Zero(make_mesh(), stage, smallest=1)
    losses, state = run(optimiser, zero, dtype, skip=3)
    ours, hosted = run(offloaded(optimiser, smallest=64), zero, dtype, skip=3)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert ours[-1] < ours[0]
    assert int(hosted.skipped) == 1
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(hosted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-2 if dtype else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_is_large_stands_on_the_host(name):
    optimiser, dtype = OPTIMISERS[name]
    _, state = run(offloaded(optimiser, smallest=64), Zero(make_mesh(), 2), dtype, steps=2)
    for x in jax.tree.leaves(state.optimiser):
        assert (x.sharding.memory_kind == HOST) == (x.size >= 64)
    assert any(x.size >= 64 for x in jax.tree.leaves(state.optimiser))


@pytest.mark.parametrize("stage", [None, 0, 3])
def test_a_checkpoint_of_it_goes_on_to_the_bit(tmp_path, stage):
    zero = None if stage is None else Zero(make_mesh(), stage, smallest=1)
    batch = jnp.ones((8, WIDTH))

    def step():
        return make_step(loss, offloaded(ADAM, smallest=64), zero=zero)

    state, _ = step()(step().init(PARAMS), None, batch)
    assert fingerprint(state) == fingerprint(jax.tree.map(np.asarray, state))
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        got, _ = saved.restore(step().init(PARAMS))
    kinds = [[jax.typeof(x).memory_space for x in jax.tree.leaves(s)] for s in (state, got)]
    assert kinds[0] == kinds[1]
    assert jax.memory.Space.Host in kinds[0]
    for a, b in zip(*(jax.tree.leaves(step()(s, None, batch)) for s in (state, got)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layer_by_layer_only_where_layers_are_independent():
    def layers(optimiser, params=PARAMS):
        state, grads = optimiser.init(params), jax.tree.map(jnp.ones_like, params)
        moved = dict.fromkeys(
            jax.tree_util.keystr(p, simple=True, separator="/")
            for p, _ in jax.tree_util.tree_flatten_with_path(state)[0]
        )
        finite = jnp.bool_(True)
        return by_layers(optimiser, grads, state, params, finite, moved, r"(^|/)layers/")

    def one_after_another(updates, state, params=None):
        def add(total, x):
            return total + x, total + x

        def along(x):
            return jax.lax.scan(add, jnp.zeros(x.shape[1:]), x)[1]

        return jax.tree.map(along, updates), state

    assert layers(ADAM) is not None
    assert layers(MATRICES) is not None
    assert layers(OPTIMISERS["masters"][0]) is not None
    for name in ("a norm over all", "8 bits"):
        assert layers(OPTIMISERS[name][0]) is None
    half = jpeft.cast(PARAMS, jnp.bfloat16)
    assert layers(OPTIMISERS["rounded at random"][0], half) is None
    assert layers(optax.adafactor(1e-2)) is None
    summed = optax.GradientTransformation(lambda _: optax.EmptyState(), one_after_another)
    assert layers(optax.chain(summed, ADAM)) is None
    assert layers(ADAM, {"head": PARAMS["head"]}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: jpeft.master_weights(offloaded(ADAM, smallest=1)),
        lambda: optax.chain(optax.clip(1.0), offloaded(ADAM, smallest=1)),
    ],
)
def test_it_has_to_be_outermost(wrong):
    step = make_step(lambda t, f, b, k: jnp.sum(t["w"] ** 2), wrong())
    with pytest.raises(ValueError, match="put it outermost"):
        step.init({"w": jnp.ones((4, 4))})


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        offloaded(ADAM, ahead=0)


@pytest.mark.xdist_group("tpu")
def test_a_compiled_program_holds_one_layer_of_the_state():
    pytest.importorskip("libtpu")
    many, wide = 16, 512
    shape = {"layers": {"a": jax.ShapeDtypeStruct((many, wide, wide), jnp.float32)}}
    zero = Zero(make_mesh({"fsdp": 1}, topology("v5p:2x2x1")[:1]), 0)
    batch = placed(jax.ShapeDtypeStruct((8, wide), jnp.float32), zero.replicated)

    def loss(params, frozen, batch, key):
        def layer(x, a):
            return jnp.tanh(x @ a), None

        return jax.lax.scan(layer, batch, params["layers"]["a"])[0].mean()

    def memory(optimiser):
        step = make_step(loss, optimiser, zero=zero)
        return compile_for(step, step.abstract(shape), None, batch).memory

    plain, hosted = memory(ADAM), memory(offloaded(ADAM))
    moments = 2 * 4 * many * wide * wide
    assert hosted.host == pytest.approx(moments, rel=0.01)
    assert plain.total - hosted.total > 0.8 * moments
