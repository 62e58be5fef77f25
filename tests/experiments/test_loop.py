"""The training loop when gradients are not finite, or batches run out."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.loop import DivergedError, Skips, train
from sharding import make_step


@dataclasses.dataclass
class Root:
    """The mean of a square root, whose gradient at zero is not finite."""

    steps: int

    def __post_init__(self):
        self.schedule = types.SimpleNamespace(steps=self.steps)
        self.frozen = None
        self.step = make_step(lambda w, _, b, k: jnp.mean(jnp.sqrt(b["x"] * w)), optax.sgd(0.1))

    def init(self):
        return self.step.init(jnp.ones(()))

    def key(self, step):
        return jax.random.key(step)


def batches(*values):
    mask = np.ones((2, 3), np.int32)
    return [{"x": np.full(2, x, np.float32), "attention_mask": mask} for x in values]


def test_skipped_steps_are_told_once_and_logged(capsys):
    logged = []
    _, progress = train(Root(5), batches(1, 0, 1, 0, 1), None, log=logged.append)
    assert progress.step == 5
    assert [entry["skipped"] for entry in logged] == [0, 1, 1, 2, 2]
    assert capsys.readouterr().err.count("the gradient is not finite by step 2") == 1


@pytest.mark.parametrize(
    ("values", "told"),
    [([1, *[0] * 20], "from step 2 to 11: try a lower --lr"), ([0] * 3, "from step 1 to 3")],
)
def test_a_run_without_gradients_stops(values, told):
    with pytest.raises(DivergedError, match=told):
        train(Root(len(values)), batches(*values), None, log=lambda _: None)


def test_many_steps_of_one_program_are_counted():
    skips = Skips(100)
    skips.seen(8, 3)
    skips.seen(12, 7)
    assert (skips.total, skips.row) == (7, 4)
    with pytest.raises(DivergedError, match="from step 9 to 18"):
        skips.seen(18, 13)


def test_batches_that_run_out_are_told():
    with pytest.raises(ValueError, match="3 batches for 5 steps"):
        train(Root(5), batches(1, 1, 1), None, log=lambda _: None)
