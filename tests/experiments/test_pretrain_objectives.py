"""What is masked or cut out of rows, and how large the named models are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.pretrain_masks import masked
from experiments.common.pretrain_objectives import objective
from experiments.common.pretrain_sizes import FAMILIES, SIZES, shape_of
from experiments.common.pretrain_spans import (
    Spans,
    corrupted,
    longest_window,
    noise_mask,
    spans_of,
)
from experiments.common.pretrain_tokens import Vocabulary
from jpeft.models.loss import IGNORED

BIG = Vocabulary(8192)


def test_masks_are_80_10_10(key):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 8092, (512, 128)).astype(np.int32)
    ids[:, 0], ids[:, -1] = BIG.first, BIG.end
    ids[0, 1:-1] = BIG.end  # nothing to mask
    ids[1, 1:-1] = BIG.unknown
    made = masked(jnp.asarray(ids), BIG, key)
    read, at, labels = map(np.asarray, made)
    assert labels.shape == (512, 19)
    assert all(len({*row}) == 19 for row in at)
    assert (labels[:2] == IGNORED).all()
    assert (read[:2] == ids[:2]).all()
    rows = np.arange(512)[:, None]
    np.testing.assert_array_equal(labels[2:], ids[rows, at][2:])
    untouched = np.ones_like(ids, bool)
    untouched[rows, at] = False
    assert (read[untouched] == ids[untouched]).all()
    now, was = read[rows, at][2:], labels[2:]
    assert np.mean(now == BIG.mask) == pytest.approx(0.8, abs=0.015)
    assert np.mean(now == was) == pytest.approx(0.1, abs=0.01)
    random = now[(now != was) & (now != BIG.mask)]
    assert len(random) / now.size == pytest.approx(0.1, abs=0.01)
    assert random.min() >= 5
    assert random.max() < 8092
    assert len({*random.tolist()}) > 0.8 * len(random)
    # Every place of a row is as likely.
    counts = np.bincount(at[2:].ravel(), minlength=128)
    assert counts[0] == counts[-1] == 0
    assert counts[1:-1].min() > 40


def restored(inputs, targets, vocabulary):
    """The text that inputs and targets are of: each sentinel's span in its place."""
    low = vocabulary.ordinary[1]
    spans, at = {}, None
    assert targets[-1] == vocabulary.end
    for t in targets[:-1]:
        if t >= low:
            at = t
            spans[at] = []
        else:
            spans[at].append(t)
    assert list(spans) == [vocabulary.sentinel(i) for i in range(len(spans))]
    out = []
    for t in inputs:
        out += spans.pop(t) if t >= low else [t]
    assert not spans
    return out


@pytest.mark.parametrize("inputs", [3, 126, 511])
def test_spans_are_t5s(inputs, key):
    spans = longest_window(inputs)
    assert spans.inputs <= inputs < spans_of(spans.window + 1).inputs
    if inputs == 126:
        # 15% of 140 tokens in spans of 3.
        assert (spans.window, spans.noise, spans.count, spans.targets) == (140, 21, 7, 29)
    if inputs == 511:
        # With the end 512 tokens: what T5 was trained on is of 568, and 114 are to be written.
        assert (spans.window, spans.targets) == (568, 114)
    ids = jax.random.randint(key, (16, spans.window), 5, 8092)
    noise = np.asarray(jax.jit(noise_mask, static_argnums=(0, 1))(16, spans, key))
    assert (noise.sum(1) == spans.noise).all()
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    begins = noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]
    assert (begins.sum(1) == spans.count).all()
    made = jax.jit(corrupted, static_argnums=(1, 2))(ids, spans, BIG, key)
    assert made.inputs.shape == (16, spans.inputs)
    assert made.targets.shape == (16, spans.targets)
    for row, a, b, out in zip(*map(np.asarray, (ids, *made, noise)), strict=True):
        assert restored(a.tolist(), b.tolist(), BIG) == row.tolist()
        assert [t for t in b if t < 8092 and t != BIG.end] == row[out].tolist()


def test_lengths_of_spans_are_evenly_drawn():
    """Of 7 tokens 2 in 2 spans: the 5 others are cut in two in 4 ways, each as likely."""
    spans = Spans(7, 2, 2)
    noise = np.asarray(noise_mask(4000, spans, jax.random.key(1)))
    ways, counts = np.unique(noise, axis=0, return_counts=True)
    assert len(ways) == 4
    np.testing.assert_allclose(counts, 1000, atol=120)


# -- sizes, tokens -------------------------------------------------------------------------------

COUNTS = {
    "0.3m": (301_088, 288_928, 303_456),
    "1m": (1_040_480, 1_008_096, 1_045_344),
    "4m": (4_180_736, 4_229_568, 4_082_688),
    "16m": (15_774_464, 15_537_792, 15_539_328),
    "64m": (63_696_128, 62_927_616, 62_929_920),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_named_sizes(size):
    for family, count in zip(FAMILIES, COUNTS[size], strict=True):
        shape = shape_of(family, size)
        shapes = jax.eval_shape(
            lambda f=family, s=shape: objective(f, s, BIG, 128, jnp.float32, 0).params
        )
        found = sum(x.size for x in jax.tree.leaves(shapes))
        assert found == count
        assert found == pytest.approx(1e6 * float(size[:-1]), rel=0.08)
    if size == "4m":
        assert COUNTS[size][0] <= 4_300_000
    assert shape.rate == pytest.approx({32: 3e-3, 384: 1e-3}.get(shape.width, shape.rate))
