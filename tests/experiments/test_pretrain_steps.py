"""Compiled pre-training steps: a mesh, masters, calls of any length, what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.pretrain_loop import calls, default_marks
from experiments.common.pretrain_objectives import objective
from experiments.common.pretrain_sizes import shape_of
from experiments.common.pretrain_steps import Pretrainer, Schedule
from experiments.common.pretrain_tokens import Vocabulary
from experiments.common.scale import Scale
from jpeft.paths import flatten


def trainer(scale=Scale(), dtype=jnp.float32, **options):  # noqa: B008
    shape = shape_of("decoder", "0.3m")
    made = objective("decoder", shape, Vocabulary(256), 16, dtype, 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 156, 400).astype(np.uint16)
    return Pretrainer(made, Schedule(1e-3, 8), 8, tokens, tokens[:100], scale=scale, **options)


def test_a_mesh_learns_the_same():
    alone, meshed = trainer(), trainer(Scale("data=2,fsdp=4", 3))
    (a, losses), (b, theirs) = (t.steps(t.init(), 2) for t in (alone, meshed))
    np.testing.assert_allclose(losses, theirs, rtol=1e-5)
    assert int(a.step) == int(b.step) == 2
    here, there = (t.held_out_loss(s, 4) for t, s in ((alone, a), (meshed, b)))
    assert here[0] == pytest.approx(there[0], rel=1e-5)
    assert here[1] == there[1]


def test_bf16_with_masters():
    made = trainer(Scale(precision="mixed"), jnp.bfloat16)
    state, losses = made.steps(made.init(), 4)
    assert losses[3] < losses[0]
    kept = flatten(state.trainable)
    # Tables are added to row by row, and stay as they are.
    tables = {p for p in kept if p.endswith("/embedding")}
    assert tables
    for path, x in kept.items():
        assert x.dtype == ("float32" if path in tables else "bfloat16")
    masters = flatten(state.optimiser.masters)
    assert {x.dtype for x in masters.values()} == {jnp.dtype("float32")}
    for path, x in kept.items():
        assert masters[path].astype(x.dtype).tolist() == x.tolist()


def test_steps_are_the_same_in_any_calls():
    one, many = trainer(), trainer()
    state, losses = one.init(), []
    for _ in range(4):
        state, loss = one.steps(state, 1)
        losses += loss.tolist()
    at_once = many.steps(many.init(), 4)[1]
    np.testing.assert_allclose(losses, at_once, rtol=1e-5)
    assert len({*losses}) == 4
    other = trainer(seed=1)
    assert other.steps(other.init(), 1)[1][0] != losses[0]


def test_what_decays_and_the_rate():
    schedule = Schedule(1e-2, 100, decay=1.0)
    params = {
        "a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "embed_tokens": {"embedding": jnp.ones(2)},
        "relative_attention_bias": {"embedding": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2)},
    }
    optimiser = schedule.optimiser()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimiser.update(zeros, optimiser.init(params), params)
    moved = {k: {n: bool(x.any()) for n, x in v.items()} for k, v in updates.items()}
    assert moved == {
        "a": {"kernel": True, "bias": False},
        "embed_tokens": {"embedding": True},
        "relative_attention_bias": {"embedding": False},
        "norm": {"scale": False},
    }
    assert float(updates["a"]["kernel"][0]) == pytest.approx(-1e-2 / 5)  # the warm-up's first


def test_calls_end_at_marks_wherever_they_begin():
    assert default_marks(5000) == (0, 64, 256, 1024, 4096, 5000)
    assert default_marks(64) == (0, 64)
    assert default_marks(10) == (0, 10)
    assert calls(10, 4, (0, 2, 10)) == [2, 2, 4, 2]
    assert calls(10, 4, (0, 2, 10), begun=4) == [4, 2]
    assert calls(4096, 64, default_marks(4096)) == [64] * 64
    assert calls(10, 4, (), begun=10) == []


# -- masks and spans -----------------------------------------------------------------------------
