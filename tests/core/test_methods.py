"""What every method must do, on every kind of model and under every transformation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests.core import zoo

KERNELS = r"(query|value)/(kernel|weight)$"
DOWN = r"down/(kernel|weight)$"
BIASES = r"(out|down)/bias$"
TABLE = r"embed/(embedding|weight)$"
LOW = jpeft.LoRA(2, 4.0, KERNELS)


@dataclasses.dataclass(frozen=True)
class Method:
    """A transform, and what is to be expected of it."""

    transform: jpeft.Transform
    virtual: int = 0  # positions of the input that it takes
    merges: bool = True
    start: float = 1e-5  # how near the model it starts; inf for a prompt


METHODS = {
    "lora": Method(LOW),
    "lora of tables": Method(jpeft.LoRA(2, 4.0, (TABLE, DOWN))),
    "rslora": Method(jpeft.LoRA(2, 4.0, KERNELS, rslora=True)),
    "dora": Method(jpeft.LoRA(2, 4.0, KERNELS, dora=True)),
    "parts": Method(jpeft.LoRA(2, 4.0, r"up/(kernel|weight)$", parts={"up": (2, (1,))})),
    "dylora": Method(jpeft.DyLoRA(3, 4.0, KERNELS)),
    "train": Method(jpeft.Train(DOWN)),
    "the last layer": Method(jpeft.Train(DOWN, last=1)),
    "ia3": Method(jpeft.IA3(r"(key|value)/(kernel|weight)$", DOWN)),
    "bitfit": Method(jpeft.bitfit()),
    "did": Method(jpeft.Subspace(20, KERNELS)),
    "said": Method(jpeft.Subspace(30, KERNELS, scales="layer")),
    "said by tensor": Method(
        jpeft.Subspace(30, KERNELS, scales="tensor", projection="dense"),
    ),
    "sparse subspace": Method(jpeft.Subspace(20, KERNELS, projection="sparse")),
    "adapter": Method(jpeft.Adapter(4, BIASES), merges=False, start=1e-3),
    "adapter at zero": Method(jpeft.Adapter(4, BIASES, zero_up=True), merges=False),
    "adapter on a kernel": Method(jpeft.Adapter(4, DOWN), merges=False, start=1e-3),
    "parallel adapter": Method(jpeft.parallel_adapter(4, DOWN), merges=False, start=1e-3),
    "pfeiffer": Method(jpeft.pfeiffer(4, r"down/bias$"), merges=False, start=1e-3),
    "houlsby": Method(jpeft.houlsby(4, BIASES, r"head/"), merges=False, start=1e-3),
    "prefix": Method(
        jpeft.PrefixTuning(2, r"(key|value)/bias$", std=0.5), 2, merges=False, start=np.inf
    ),
    "prefix by a network": Method(
        jpeft.PrefixTuning(2, r"(key|value)/(kernel|weight)$", mlp=5, std=0.5),
        2,
        merges=False,
        start=np.inf,
    ),
    "values after the first token": Method(
        jpeft.PrefixTuning(2, r"value/bias$", after=1), 2, merges=False, start=np.inf
    ),
    "prompt": Method(jpeft.PromptTuning(2, TABLE), 2, merges=False, start=np.inf),
    "lora over ia3": Method(jpeft.chain(jpeft.IA3(KERNELS), LOW)),
    "ia3 over lora": Method(jpeft.chain(LOW, jpeft.IA3(KERNELS))),
    "lora twice": Method(jpeft.chain(LOW, jpeft.LoRA(1, 4.0, r"query/(kernel|weight)$"))),
    "lora and a head": Method(jpeft.chain(LOW, jpeft.Train("head/"))),
    "adapter over lora": Method(
        jpeft.chain(jpeft.LoRA(2, 4.0, DOWN), jpeft.Adapter(4, DOWN)), merges=False, start=1e-3
    ),
    "prompt, prefix and lora": Method(
        jpeft.chain(
            LOW,
            jpeft.PromptTuning(1, TABLE),
            jpeft.PrefixTuning(1, r"(key|value)/bias$", after=1, std=0.5),
        ),
        2,
        merges=False,
        start=np.inf,
    ),
    "said and a head": Method(jpeft.chain(jpeft.Train("head/"), jpeft.Subspace(20, KERNELS))),
}
make = functools.cache(zoo.make)


def inputs(method):
    """Token ids, with room for the method's virtual ones."""
    if not method.virtual:
        return zoo.IDS
    first = zoo.VOCABULARY if "PromptTuning" in repr(method.transform) else 0
    batch = {"input_ids": zoo.IDS}
    return jpeft.virtual_tokens(batch, length=method.virtual, first=first)["input_ids"]


@functools.cache
def started(method, model):
    """The state at the start; compiled in one piece, which is what takes time."""
    return jax.jit(lambda key: method.transform.init(key, model.params, uses=model.uses))(
        jax.random.key(0)
    )


def trained(method, model, scale=0.3, seed=9):
    """A state away from the start, as after training."""
    noise = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda x: x + scale * noise(size=x.shape).astype(x.dtype),
        started(method, model),
    )


# Variants of a transform that is tried on every model: these on scanned layers alone.
VARIANTS = {"lora of tables", "rslora", "parts", "said by tensor", "sparse subspace", "pfeiffer"}
VARIANTS |= {"adapter at zero", "adapter on a kernel", "values after the first token"}
VARIANTS |= {"lora over ia3", "ia3 over lora", "lora twice", "adapter over lora"}
VARIANTS |= {"the last layer", "said and a head", "prompt, prefix and lora"}


# What `lift` does to a call hardly depends on how the model is written: transformations of it and
# tasks are tried with every method on scanned layers and on modules that see one example, and on
# every model with one method of each kind of leaf.
WHOLE = ("scanned", "equinox")
KINDS = ("lora", "adapter", "prefix", "prompt", "did")


def is_whole(name, model):
    return model in WHOLE or name in KINDS


def cases(chosen=lambda name, model: True):
    """Every method on every model; a worker keeps the programs of its own pairs."""
    for name in METHODS:
        for model in zoo.MAKERS if name not in VARIANTS else ("scanned",):
            if chosen(name, model):
                group = pytest.mark.xdist_group(f"{name} on {model}")
                yield pytest.param(name, model, marks=group, id=f"{name}-{model}")


def check_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


each = pytest.mark.parametrize(("name", "model"), list(cases()))
each_whole = pytest.mark.parametrize(("name", "model"), list(cases(is_whole)))


def in_jit(apply):
    return jax.jit(apply)


def in_scan(apply):
    def run(params, ids):
        def step(total, row):
            return total + apply(params, row[None])[0], None

        zero = jnp.zeros_like(apply(params, ids[:1])[0])
        return jax.lax.scan(step, zero, ids)[0][None]

    return run


def in_remat(apply):
    return jax.checkpoint(apply)


def in_vmap(apply):
    return jax.vmap(lambda params, row: apply(params, row[None])[0], (None, 0))


ALIKE = (in_jit, in_remat, in_vmap)
TASKS = {"each": jnp.array([1, 0, 1]), "none": jnp.array([0, -1, 1])}


def mapped(run, by_name):
    """`run` of each, compiled once."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *by_name.values())
    out = jax.lax.map(run, stacked)
    return dict(zip(by_name, out, strict=True))


@functools.cache
def found(name, model):
    """All that the tests of a method on a model look at, by one compiled program."""
    whole = is_whole(name, model)
    method, model = METHODS[name], make(model)
    transform, forward, ids = method.transform, jpeft.lift(model.apply), inputs(method)
    states = {"start": started(method, model), "moved": trained(method, model)}
    states |= {str(seed): trained(method, model, seed=seed) for seed in (1, 2)}
    states["fp32"] = jax.tree.map(lambda x: x / 3, states["moved"])

    def loss(state, params, through=forward):
        return jnp.sum(through(transform.rewrite(params, state), ids) ** 2)

    def program(states, params, half):
        def run(state, params=params):
            return forward(transform.rewrite(params, state), ids)

        def mixed(stacked, task):
            return forward(transform.rewrite(params, stacked, task=task), ids)

        moved, stacked = states["moved"], jpeft.stack([states["1"], states["2"]])
        rewritten = transform.rewrite(params, moved)
        out = {
            "model": model.apply(params, zoo.IDS),
            "model in bf16": model.apply(half, zoo.IDS),
            "bf16": run(states["fp32"], half),
            "grads": jax.grad(loss)(moved, params),
            **mapped(run, states),
        }
        if whole:
            out["sum"] = jpeft.lift(in_scan(model.apply))(rewritten, ids)
            out["alike"] = [jpeft.lift(f(model.apply))(rewritten, ids) for f in ALIKE]
            out["mixed"] = mapped(lambda task: mixed(stacked, task), TASKS)
            tasks = jnp.array([1, 1, -1])
            out["mixed grads"] = jax.grad(lambda s: mixed(s, tasks).sum())(stacked)
        if method.merges:
            out["merged"] = model.apply(jpeft.merge(rewritten), zoo.IDS)
            through = lambda q, x: model.apply(jpeft.merge(q), x)  # noqa: E731
            out["dense grads"] = jax.grad(loss)(moved, params, through)
        return out

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    return jax.tree.map(np.asarray, jax.jit(program)(states, model.params, half))


@each
def test_starts_at_the_model_and_a_trained_state_moves_it(name, model):
    out = found(name, model)
    if np.isfinite(METHODS[name].start):
        check_close(out["start"], out["model"], METHODS[name].start)
    assert np.isfinite(out["moved"]).all()
    assert np.abs(out["moved"] - out["start"]).max() > 0.02


@each
def test_merged_equals_unmerged_or_is_refused(name, model):
    method, out, model = METHODS[name], found(name, model), make(model)
    rewritten = method.transform.rewrite(model.params, trained(method, model))
    if not method.merges:
        with pytest.raises(jpeft.LeafError, match="acts where it is used"):
            jpeft.merge(rewritten)
        return
    merged = jax.eval_shape(jpeft.merge, rewritten)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    check_close(out["moved"], out["merged"], 1e-4)


@each
def test_its_own_arrays_get_gradients_and_only_they_move(name, model):
    method, grads, dense = METHODS[name], *map(found(name, model).get, ("grads", "dense grads"))
    model = make(model)
    state = trained(method, model)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    if method.merges:
        scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
        check_close(*(jax.tree.map(lambda g: g / scale, g) for g in (grads, dense)), 1e-4)
    before = jax.tree.map(np.array, model.params)
    optimiser = optax.adamw(1e-2)

    @jax.jit
    def step(grads, state):
        updates, _ = optimiser.update(grads, optimiser.init(state), state)
        return optax.apply_updates(state, updates)

    new = step(grads, state)
    for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert not np.array_equal(old, now)
        assert now.dtype == jnp.float32
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(old, now)


@each
def test_saves_and_loads_bit_for_bit_with_its_transform(name, model, tmp_path):
    method, model = METHODS[name], make(model)
    state = trained(method, model)
    path = tmp_path / "state.safetensors"
    jpeft.save(path, state, method.transform)
    transform, found = jpeft.restore(path, model.params, uses=model.uses)
    assert transform == method.transform
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@each
def test_bf16_model_with_fp32_state(name, model):
    method, out, model = METHODS[name], found(name, model), make(model)
    half, full = out["bf16"], out["fp32"]
    assert half.dtype == out["model in bf16"].dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - full).max() < 0.05 + 0.08 * np.abs(full).max()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.params)
    start = jax.eval_shape(
        lambda key, params: method.transform.init(key, params, uses=model.uses),
        jax.random.key(0),
        shapes,
    )
    assert {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype("float32")}


@each_whole
def test_inside_every_transformation(name, model):
    out = found(name, model)
    check_close(out["sum"], out["moved"].sum(0)[None], 1e-4)
    for other in out["alike"]:
        check_close(other, out["moved"], 1e-4)


@pytest.mark.parametrize("name", [*(n for n in METHODS if n not in VARIANTS), "adapter over lora"])
@pytest.mark.parametrize("model", ["scanned"])
def test_outside_every_transformation(name, model):
    method, plain, model = METHODS[name], found(name, model)["moved"], make(model)
    state, ids = trained(method, model), inputs(method)
    forward = jpeft.lift(model.apply)

    def run(state, ids):
        return forward(method.transform.rewrite(model.params, state), ids)

    if name in KINDS:  # as slow as it is alike: every leaf's rule, one operation after another
        check_close(run(state, ids), plain, 1e-4)

    @jax.jit
    def inside(state, states, other, ids):
        grad = jax.grad(lambda s: run(s, ids).sum())(state)
        again = jax.grad(lambda s: jax.checkpoint(run)(s, ids).sum())(state)
        # Many states at once, one example each.
        two = jax.vmap(lambda s, row: run(s, row[None])[0])(states, ids[:2])
        return grad, again, two, run(other, ids[1:2])[0]

    other = jax.tree.map(lambda x: np.float32(1.5) * x, state)
    states = jax.tree.map(lambda x, y: np.stack([x, y]), state, other)
    grad, again, two, one = inside(state, states, other, ids)
    check_close(grad, again, 1e-3)
    check_close(two[0], plain[0], 1e-4)
    check_close(two[1], one, 1e-4)


@each_whole
def test_many_tasks_in_one_batch(name, model):
    out, method = found(name, model), METHODS[name]
    alone = [out["1"], out["2"]]
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    expected = np.stack([alone[t][i] for i, t in enumerate(TASKS["each"])])
    check_close(out["mixed"]["each"], expected, 1e-4)
    # Gradients reach the tasks that are in the batch.
    for g in jax.tree.leaves(out["mixed grads"]):
        assert not g[0].any()
        assert g[1].any()
    # The example of no task runs as the model does.
    if not method.virtual:
        check_close(out["mixed"]["none"][1], out["model"][1], 1e-5)
    else:
        batch = {"input_ids": zoo.IDS, "attention_mask": jnp.ones_like(zoo.IDS)}
        room = jpeft.virtual_tokens(batch, length=2, task=TASKS["none"])
        np.testing.assert_array_equal(room["input_ids"][1, :5], zoo.IDS[1])
        np.testing.assert_array_equal(room["attention_mask"][1], [1, 1, 1, 1, 1, 0, 0])
