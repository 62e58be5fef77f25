"""DyLoRA: the ranks that are drawn, the scale, frozen mode, smaller ranks from one run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.leaf import dense

W = jax.random.normal(jax.random.key(1), (6, 8)) * 0.4
PARAMS = {"w": W}
METHOD = jpeft.DyLoRA(4, 16.0, "w$")
KEYS = [jax.random.key(i) for i in range(40)]


def filled(method=METHOD):
    state = method.init(jax.random.key(0), PARAMS)
    return jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(7), x.shape), state)


def delta(method, state, key=None):
    return dense(method.rewrite(PARAMS, state, key=key)["w"]) - W


def of_rank(state, b):
    f = state["w"]
    return 16.0 / b * f.a[:, :b] @ f.b[:b]


def test_every_step_has_a_rank_and_its_scale():
    state = filled()
    seen = set()
    for key in KEYS:
        update = delta(METHOD, state, key)
        near = [b for b in range(1, 5) if np.allclose(update, of_rank(state, b), atol=1e-4)]
        assert len(near) == 1
        seen.update(near)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("ranks", "chances"), [("uniform", [0.25] * 4), ("geometric", [0.5, 0.25, 0.125, 0.0625])]
)
def test_how_ranks_are_drawn(ranks, chances):
    method = jpeft.DyLoRA(4, 16.0, "w$", ranks=ranks, p=0.5)
    drawn = jax.vmap(method.draw)(jax.random.split(jax.random.key(0), 20_000))
    share = np.bincount(drawn, minlength=5)[1:] / 20_000
    np.testing.assert_allclose(share, np.array(chances) / sum(chances), atol=0.015)


def test_one_rank_for_all_parameters_of_a_step():
    both = {"one": {"w": W}, "two": {"w": 2 * W}}
    state = METHOD.init(jax.random.key(0), both)
    state = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(7), x.shape), state)
    for key in KEYS[:10]:
        leaves = METHOD.rewrite(both, state, key=key)
        ranks = [int(jnp.sum(jnp.any(leaves[n]["w"].a != 0, axis=0))) for n in both]
        assert ranks[0] == ranks[1]


@pytest.mark.parametrize("frozen", [False, True])
def test_which_columns_are_trained(frozen):
    method = jpeft.DyLoRA(4, 16.0, "w$", frozen=frozen)
    state = filled(method)
    for key in KEYS[:12]:
        b = int(method.draw(jax.random.fold_in(key, 0)))
        grads = jax.grad(lambda s, k=key: jnp.sum(delta(method, s, k) ** 2))(state)["w"]
        moved = [bool(grads.a[:, i].any()) and bool(grads.b[i].any()) for i in range(4)]
        assert moved == [i == b - 1 if frozen else i < b for i in range(4)]
        # The forward pass is the same in both modes.
        np.testing.assert_allclose(delta(method, state, key), of_rank(state, b), atol=1e-4)


def test_smaller_ranks_from_one_run():
    state = filled()
    for b in range(1, 5):
        lora, small = METHOD.at(state, b)
        assert isinstance(lora, jpeft.LoRA)
        assert not isinstance(lora, jpeft.DyLoRA)
        assert small["w"].a.shape == (6, b)
        np.testing.assert_allclose(delta(lora, small), of_rank(state, b), atol=1e-4)
        used = jpeft.DyLoRA(4, 16.0, "w$", rank_used=b)
        np.testing.assert_allclose(delta(used, state), of_rank(state, b), atol=1e-4)
    np.testing.assert_allclose(delta(METHOD, state), of_rank(state, 4), atol=1e-4)


@pytest.mark.parametrize("rank_used", [None, 2])
def test_unmerging_gives_the_base_again(rank_used):
    method = jpeft.DyLoRA(4, 16.0, "w$", rank_used=rank_used)
    state = filled(method)
    merged = jpeft.merge(method.rewrite(PARAMS, state))
    assert not np.allclose(merged["w"], W)
    np.testing.assert_allclose(method.unmerge(merged, state)["w"], W, atol=1e-5)


@pytest.mark.parametrize("key", [None, KEYS[0]])
def test_a_state_of_other_parameters_is_refused(key):
    with pytest.raises(jpeft.TargetError, match="'w', which these parameters do not have"):
        METHOD.rewrite({"other": W}, filled(), key=key)


def test_errors(unchecked):
    with pytest.raises(ValueError, match="no dora"):
        jpeft.DyLoRA(4, dora=True)
    with pytest.raises(ValueError, match="rank_used is 1 to 4, got 5"):
        jpeft.DyLoRA(4, rank_used=5)
    with pytest.raises(ValueError, match="'uniform' or 'geometric'"):
        jpeft.DyLoRA(4, ranks="normal")
    with pytest.raises(ValueError, match="p must be between"):
        jpeft.DyLoRA(4, p=1.0)
    with pytest.raises(ValueError, match="ranks 1 to 4, not 5"):
        METHOD.at(filled(), 5)
