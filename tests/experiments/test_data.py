"""Readers, tasks, metrics, the sample, the pipeline."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, matthews_corrcoef

from experiments.common import metrics
from experiments.common.pipeline import Batches, Shapes, in_order, shapes
from experiments.common.readers import DataError
from experiments.common.sample import SAMPLE
from experiments.common.sample.make import make
from experiments.common.tasks import load
from experiments.common.tokens import Example

LAYOUTS = {
    "sst2": {"train.tsv": "sentence\tlabel\nfine\t1\n", "dev.tsv": "sentence\tlabel\nbad\t0\n"},
    "cola": {
        "train.tsv": "x\t1\t\tHe runs.\n",
        "in_domain_dev.tsv": "x\t0\t*\tRuns he he.\n",
        "out_of_domain_dev.tsv": 'x\t1\t\t"Quotes" stay.\n',
    },
    "mrpc": {
        "msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        "1\t5\t6\ta b\tb a\n0\t7\t8\tc\td\n",
        "dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\ta b\tb a\n",
    },
    "rte": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
    },
    "stsb": {
        "train.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.500\n",
        "dev.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t5\n",
    },
    "qqp": {
        "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta?\tb?\t1\n",
        "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta?\tb?\t0\n",
    },
    "mnli": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tneutral\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tcontradiction\n",
    },
    "qnli": {
        "train.json": json.dumps({"0": {"text_a": "q", "text_b": "s", "label": "entailment"}}),
        "dev.tsv": "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n",
    },
}
FIRST = {"sst2": 1, "cola": 1, "mrpc": 0, "rte": 1, "stsb": 2.5, "qqp": 1, "mnli": 1, "qnli": 0}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", LAYOUTS)
def test_glues_own_layout(task, tmp_path):
    folder = {"sst2": "SST-2", "cola": "CoLA", "stsb": "STS-B"}.get(task, task.upper())
    write(tmp_path / folder, LAYOUTS[task])
    found = load(task, tmp_path)
    assert [r.label for r in found.train] == [FIRST[task]]
    assert len(found.validation) == (2 if task == "cola" else 1)
    assert all(t for r in (*found.train, *found.validation) for t in r.texts)
    if task == "mrpc":
        assert "less 1 rows of train that stand in validation" in found.source
    if task == "cola":
        assert found.validation[1].texts == ('"Quotes" stay.',)


BROKEN = {
    "no label column": ({"train.tsv": "sentence\tanswer\nfine\t1\n"}, "no column 'label'; its"),
    "empty file": ({"train.tsv": ""}, r"train.tsv is empty"),
    "header alone": ({"train.tsv": "sentence\tlabel\n"}, "has no examples"),
    "a label of another task": ({"train.tsv": "sentence\tlabel\nx\t7\n"}, "line 2: the label '7'"),
    "a short line": ({"train.tsv": "sentence\tlabel\nx\n"}, "line 2: 1 columns where the header"),
    "no validation": ({"train.tsv": "sentence\tlabel\nx\t1\n", "dev.tsv": None}, "no validation"),
    "no train": ({"train.tsv": None}, "has none of train.tsv"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_data_is_told(what, tmp_path):
    files, message = BROKEN[what]
    merged = {**LAYOUTS["sst2"], **files}
    write(tmp_path, {k: v for k, v in merged.items() if v is not None})
    with pytest.raises(DataError, match=message):
        load("sst2", tmp_path)


def test_bytes_that_are_no_text(tmp_path):
    write(tmp_path, LAYOUTS["sst2"])
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load("sst2", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load("sst2", tmp_path / "absent")


def test_real_folders(data):
    counts = {
        ("sst2", "sst2_sentence"): (6920, 872),
        ("sst2", "sst2_glue"): (60614, 872),
        ("mrpc", "mrpc"): (3668, 408),
        ("cola", "cola"): (8551, 1043),
        ("rte", "rte"): (2490, 277),
        ("stsb", "stsb"): (5749, 1500),
        ("qnli", "glue_subsets"): (8999, 5463),
        ("qqp", "glue_subsets"): (8999, 1000),
        ("mnli", "glue_subsets"): (8999, 1000),
    }
    for (task, folder), sizes in counts.items():
        found = load(task, data / folder)
        assert (len(found.train), len(found.validation)) == sizes, task


def test_the_sample_is_what_its_generator_writes():
    for name, rows in make().items():
        text = "".join(f"{t}\t{label}\n" for t, label in rows)
        assert (SAMPLE / f"{name}.tsv").read_text() == text
    found = load("sample", None)
    texts = [{r.texts for r in part} for part in (found.train, found.validation)]
    assert not texts[0] & texts[1]
    assert np.mean([r.label for r in found.validation]) == 0.5


def test_a_bag_of_words_does_not_solve_the_sample():
    found = load("sample", None)
    (x, y), (v, z) = (
        ([r.texts[0] for r in part], [r.label for r in part])
        for part in (found.train, found.validation)
    )
    words = CountVectorizer()
    fitted = LogisticRegression(max_iter=2000).fit(words.fit_transform(x), y)
    assert fitted.score(words.transform(v), z) < 0.75


labels = st.lists(st.integers(0, 1), min_size=2, max_size=30)


@given(labels, st.randoms(use_true_random=False))
def test_metrics_of_classes_equal_sklearns(answers, random):
    guess = np.array([random.randint(0, 1) for _ in answers], float)
    truth = np.array(answers, float)
    assert metrics.f1(guess, truth) == pytest.approx(f1_score(truth, guess, zero_division=0))
    assert metrics.matthews(guess, truth) == pytest.approx(matthews_corrcoef(truth, guess))
    assert metrics.accuracy(guess, truth) == np.mean(guess == truth)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_correlations_equal_scipys(pairs):
    from scipy.stats import pearsonr, spearmanr

    a, b = np.array(pairs, float).T
    if np.ptp(a) and np.ptp(b):
        assert metrics.pearson(a, b) == pytest.approx(pearsonr(a, b).statistic, abs=1e-9)
        assert metrics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    else:
        assert metrics.pearson(a, b) == metrics.spearman(a, b) == 0


def test_evaluate_and_majority():
    outputs = np.array([[2, 1], [0, 1], [0, 3]], np.float32)
    answers = np.array([0.0, 1.0, 0.0])
    assert metrics.evaluate(("accuracy",), outputs, answers) == {"accuracy": pytest.approx(2 / 3)}
    assert metrics.majority(("accuracy", "f1"), answers, 2) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": 0.0,
    }


def examples(lengths):
    return [Example(list(range(1, n + 1)), [0] * n, float(i)) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=90), st.integers(1, 9), st.integers(0, 9))
def test_an_epoch_holds_every_example_once(lengths, size, seed):
    rows = examples(lengths)
    batches = Batches(rows, shapes(rows, size, 48), 0, seed)
    iterator = iter(batches)
    for _ in range(2):
        seen = []
        for _ in range(batches.per_epoch):
            b = next(iterator)
            assert b["input_ids"].shape[0] == size
            assert b["input_ids"].shape[1] in batches.shapes.lengths
            valid = b["valid"] == 1
            seen += b["labels"][valid].astype(int).tolist()
            for i in np.flatnonzero(valid):
                assert b["attention_mask"][i].sum() == lengths[int(b["labels"][i])]
        assert sorted(seen) == list(range(len(rows)))


def test_few_lengths_and_little_padding():
    rows = examples(np.random.default_rng(0).integers(5, 60, 2000).tolist())
    found = shapes(rows, 32, 64)
    assert len(found.lengths) <= 3
    assert shapes(rows, 32, 64, buckets=1).lengths == (64,)
    assert shapes(rows[:1], 32, 3).lengths == (3,)
    with pytest.raises(ValueError, match="--buckets 0: batches need one length"):
        shapes(rows, 32, 64, buckets=0)
    with pytest.raises(ValueError, match="--batch 0: at least 1"):
        shapes(rows, 0, 64)
    batches = Batches(rows, found, 0, 0)
    iterator = iter(batches)
    drawn = [next(iterator) for _ in range(batches.per_epoch)]
    real = sum(b["attention_mask"].sum() for b in drawn)
    assert real / sum(b["attention_mask"].size for b in drawn) > 0.7


def test_order_is_seeded_new_every_epoch_and_resumable():
    rows = examples([3] * 50)
    batches = Batches(rows, Shapes(4, (8,)), 0, 1)
    first, second = iter(batches), iter(batches)
    run = [next(first)["labels"].tolist() for _ in range(30)]
    assert run[:13] != run[13:26]
    for _ in range(7):
        next(second)
    state = json.loads(json.dumps(second.get_state()))
    third = iter(batches)
    third.set_state(state)
    assert [next(third)["labels"].tolist() for _ in range(23)] == run[7:]
    other = iter(Batches(rows, Shapes(4, (8,)), 0, 2))
    assert next(other)["labels"].tolist() != run[0]


def test_in_order_covers_all():
    rows = examples([5, 1, 9, 2, 2])
    found = list(in_order(rows, Shapes(2, (4, 12)), 0))
    assert sorted(np.concatenate([n for n, _ in found]).tolist()) == [0, 1, 2, 3, 4]
    assert {b["input_ids"].shape for _, b in found} <= {(2, 4), (2, 12)}
