"""What each of several processes makes of a batch: its rows, as long as the whole."""

import numpy as np
import pytest

from experiments.common.language import Tokens, batches, packed
from experiments.common.long_texts import draw_rows
from experiments.common.pipeline import Batches, Shapes, Share, in_order, shapes
from experiments.common.readers import DataError
from experiments.common.texts import byte_codec
from experiments.common.tokens import Example, Later, encoded, sizes


def examples(lengths):
    return [Example(list(range(1, n + 1)), [0] * n, float(i)) for i, n in enumerate(lengths)]


def share_rows(batch, parts, part):
    """The rows of one of some processes, in no order of theirs."""
    return np.sort(np.random.default_rng(0).permutation(batch).reshape(parts, -1)[part])


def joined(parts, rows):
    """A batch from the rows of all processes."""
    out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    order = np.argsort(np.concatenate(rows))
    return {k: v[order] for k, v in out.items()}


def laters(examples, fields=("ids",), asked=None):
    """The same examples as a process of several has them."""

    def make(numbers):
        if asked is not None:
            asked.extend(numbers)
        return [examples[i] for i in numbers]

    return Later(make, {f: sizes(examples, f) for f in fields})


def tokens(two_sided):
    rng = np.random.default_rng(1)
    out = []
    for _ in range(27):
        n, m = rng.integers(1, 40, 2)
        ids, other = list(range(1, n + 1)), list(range(1, (m if two_sided else n) + 1))
        out.append(Tokens(ids, other, [1] * int(n)))
    return out


@pytest.mark.parametrize("kind", ["encoder", "decoder", "two sides"])
def test_shares_of_processes_make_the_batches_of_one(kind):
    if kind == "encoder":
        rows = examples(np.random.default_rng(0).integers(1, 40, 27).tolist())
        whole = Batches(rows, shapes(rows, 8, 48), 0, 3)
        lazy = Batches(laters(rows), whole.shapes, 0, 3)
    else:
        two_sided = kind == "two sides"
        rows = tokens(two_sided)
        more = (byte_codec(), 8, 48, 3, two_sided)
        whole = batches(rows, *more)
        lazy = batches(laters(rows, ("ids", "labels")), *more)
        assert lazy.shapes == whole.shapes
    numbers = [share_rows(8, 4, i) for i in range(4)]
    shares = [iter(lazy.of(Share(8, n))) for n in numbers]
    iterator = iter(whole)
    lengths = set()
    for _ in range(3 * whole.per_epoch):  # the last batch of each epoch is short
        want, got = next(iterator), joined([next(s) for s in shares], numbers)
        lengths.add(want["input_ids"].shape)
        assert want.keys() == got.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    assert len(lengths) > 1
    state = shares[0].get_state()
    assert state == iterator.get_state()


def test_shares_in_order():
    rows = examples([5, 1, 9, 2, 2, 7, 3])
    numbers = [share_rows(4, 2, i) for i in range(2)]
    of = Shapes(4, (4, 12))
    parts = [in_order(laters(rows), of, 0, Share(4, n)) for n in numbers]
    for (part, want), *got in zip(in_order(rows, of, 0), *parts, strict=True):
        assert all(np.array_equal(n, part) for n, _ in got)
        for name, value in joined([b for _, b in got], numbers).items():
            np.testing.assert_array_equal(value, want[name])


def test_a_process_of_several_encodes_its_own_rows_alone(monkeypatch):
    rows = examples(np.random.default_rng(0).integers(1, 40, 20).tolist())
    asked = []
    lazy = laters(rows, asked=asked)
    share = Share(4, np.array([1, 3]))
    iterator = iter(Batches(lazy, shapes(lazy, 4, 48), 0, 0).of(share))
    order = Batches(rows, shapes(rows, 4, 48), 0, 0).order(0)
    assert asked == []
    for numbers in order:
        next(iterator)
        assert asked == numbers[[1, 3]].tolist()
        asked.clear()
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(
        "experiments.common.tokens.measured",
        lambda count, of: np.concatenate([of(range(i, count, 2)) for i in range(2)])[
            np.argsort([*range(0, count, 2), *range(1, count, 2)])
        ],
    )
    kept = encoded(lazy.make, len(rows), longest=20)
    monkeypatch.undo()
    alone = encoded(lazy.make, len(rows), longest=20)
    assert isinstance(kept, Later)
    assert isinstance(alone, list)
    assert list(kept) == alone
    assert kept[1:3] == alone[1:3]
    assert kept[-1] == alone[-1]


def test_packed_rows_are_the_same_from_sizes():
    rows = tokens(two_sided=False)
    want, got = packed(rows, 64), packed(laters(rows, ("ids", "labels")), 64)
    assert isinstance(got, Later)
    assert list(got) == want
    np.testing.assert_array_equal(sizes(got), [len(r.ids) for r in want])
    np.testing.assert_array_equal(sizes(got, "labels"), [len(r.labels) for r in want])


def test_drawn_rows_of_a_share():
    texts = {"a": "one two three four five " * 9, "b": "short"}
    encode = byte_codec().encode
    own = np.array([1, 4, 5])
    with pytest.raises(DataError, match="b has fewer than the 20 tokens"):
        draw_rows(texts, encode, 9, 20, np.random.default_rng(0))
    del texts["b"]
    want = draw_rows(texts, encode, 9, 20, np.random.default_rng(0))
    got = draw_rows(texts, encode, 9, 20, np.random.default_rng(0), own)
    np.testing.assert_array_equal(got, want[own])
