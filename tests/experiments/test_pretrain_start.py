"""What an encoder starts from: words' company, waves for positions, queries as keys."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.pretrain_data import Data
from experiments.common.pretrain_objectives import objective
from experiments.common.pretrain_pairs import pairs_of
from experiments.common.pretrain_sizes import STARTS, shape_of
from experiments.common.pretrain_start import (
    BIAS,
    KEY,
    POSITIONS,
    QUERY,
    WORDS,
    sinusoids,
    started,
    vectors,
)
from experiments.common.pretrain_tokens import Vocabulary
from jpeft.paths import flatten

SIZE = 128  # of which 105 are special


@pytest.fixture(scope="module")
def data():
    """Two kinds of sentences, each with words of its own: 5 to 8 beside 9, 10 to 13 beside 14."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 400)
    parts = [np.append(rng.integers(5, 9, 6) + 5 * k, 9 + 5 * k) for k in kinds]
    stream = np.concatenate(parts).astype(np.uint16)
    return Data(pathlib.Path(), Vocabulary(SIZE), stream, stream, {})


@pytest.fixture(scope="module")
def params(data):
    made = objective("encoder", shape_of("encoder", "0.3m"), data.vocabulary, 32, jnp.float32, 0)
    return made.params


def test_pairs_are_counted_with_their_distance():
    stream = np.asarray([5, 6, 7, 5, 6], np.uint16)
    want = np.zeros((8, 8))
    for i, a in enumerate(stream):
        for j, b in enumerate(stream):
            if 0 < abs(i - j) <= 2:
                want[a, b] += {1: 1.0, 2: 0.5}[abs(i - j)]
    np.testing.assert_allclose(pairs_of(stream, 8, 2), want)


def test_words_of_one_company_are_alike(data):
    found = np.asarray(vectors(data.pairs, 8))
    assert np.isfinite(found).all()
    of = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    alike = of[5:15] @ of[5:15].T
    assert alike[:5, :5].min() > alike[:5, 5:].max() + 0.3
    np.testing.assert_array_equal(found[20:28], 0)  # words that never come


def test_more_numbers_than_words_are_zero(data):
    found = vectors(data.pairs, SIZE + 4)
    assert found.shape == (SIZE, SIZE + 4)
    np.testing.assert_array_equal(found[:, SIZE:], 0)


@pytest.mark.parametrize("width", [32, 33])
def test_near_positions_are_alike(width):
    waves = np.asarray(sinusoids(64, width))
    assert waves.shape == (64, width)
    alike = waves[32] @ waves.T
    assert alike[32] > alike[33] > alike[36] > alike[48]
    np.testing.assert_allclose(waves.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("starts", "changed"),
    [
        ((), set()),
        (("words",), {WORDS, BIAS}),
        (("positions",), {POSITIONS}),
        (("queries",), {QUERY, KEY}),
        (STARTS, {WORDS, BIAS, POSITIONS, QUERY, KEY}),
    ],
)
def test_what_is_named_alone_is_changed(starts, changed, params, data):
    old, new = flatten(params), flatten(started(params, starts, data))
    assert {p for p in old if not np.array_equal(old[p], new[p])} == changed
    for path in changed & {WORDS, POSITIONS}:
        assert float(jnp.std(new[path])) == pytest.approx(float(jnp.std(old[path])), rel=0.2)
    if "words" in starts:
        first, last = data.vocabulary.ordinary
        for special in (slice(0, first), slice(last, None)):
            np.testing.assert_array_equal(new[WORDS][special], old[WORDS][special])
        often = np.bincount(data.train, minlength=SIZE) + 1
        np.testing.assert_allclose(jax.nn.softmax(new[BIAS]), often / often.sum(), rtol=1e-4)
    if "queries" in starts:
        np.testing.assert_array_equal(new[QUERY], new[KEY])


def test_a_large_vocabulary_is_told(params, data):
    large = dataclasses.replace(data, vocabulary=Vocabulary(20_000))
    with pytest.raises(ValueError, match="at most 16384, and this is 20000: pass --starts positi"):
        started(params, STARTS, large)
