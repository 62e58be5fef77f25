"""Readers of prompts with answers, and the scores of answers."""

import bz2
import io
import json
import tarfile

import pytest

from experiments.common.pairs import load_pairs
from experiments.common.readers import DataError
from experiments.common.scores import SCORES, bleu, exact, number


def test_instructions(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "Say hi.", "completion": "hi"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps(rows[:1]))
    pairs = load_pairs("json", tmp_path)
    assert pairs.train[0].prompt == ("### Instruction:\nAdd.\n### Input:\n1 2\n### Response:\n")
    assert [p.answer for p in pairs.train] == ["3", "hi"]
    assert len(pairs.validation) == 1


def test_gsm8k(tmp_path):
    row = json.dumps({"question": "1 + 1?", "answer": "It is 2.\n#### 2"})
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    pairs = load_pairs("gsm8k", tmp_path)
    assert pairs.train[0].prompt == "Question: 1 + 1?\nAnswer: "
    assert pairs.metrics == ("number",)


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def test_e2e(tmp_path):
    meaning = "__start_name__ The Mill __end_name__ __start_food__ English __end_food__"
    files = {}
    for side in ("train", "valid"):
        files[f"e2e_aligned/src_{side}.txt"] = f"{meaning}\n{meaning}\n"
        files[f"e2e_aligned/{side}.txt"] = "One text . <eos>|||0,1,2\nOther . <eos>|||0,1,2\n"
    archive(tmp_path / "e2e_aligned.tar.gz", {**files, "../escape.txt": "no"})
    pairs = load_pairs("e2e", tmp_path)
    assert pairs.train[0].prompt == "name[The Mill], food[English]\nText: "
    assert pairs.train[1].answer == "Other ."
    assert pairs.validation[0].references == ("One text .", "Other .")
    assert not (tmp_path.parent / "escape.txt").exists()


def test_wikisql(tmp_path):
    sentence = {"original": "How many? ", "variables": {"var0": "A", "var10": "B"}}
    group = {"sql": ['X = "var0" AND Y = "var10" ;'], "sentences": [
        {**sentence, "question-split": split} for split in ("train", "dev", "test")
    ]}  # fmt: skip
    (tmp_path / "wikisql.json.bz2").write_bytes(bz2.compress(json.dumps([group]).encode()))
    pairs = load_pairs("wikisql", tmp_path)
    assert pairs.train[0].answer == 'X = "A" AND Y = "B" ;'
    assert (len(pairs.train), len(pairs.validation)) == (1, 1)


def damage_line(folder):
    (folder / "train.jsonl").write_text('{"question": "a", "answer": "b"}\nnot json\n')
    (folder / "test.jsonl").write_text("")


def damage_archive(folder):
    (folder / "e2e_aligned.tar.gz").write_bytes(b"no archive")


def damage_bz2(folder):
    (folder / "wikisql.json.bz2").write_bytes(bz2.compress(b"[{}]"))


def no_answer(folder):
    for name in ("train", "test"):
        (folder / f"{name}.json").write_text('[{"instruction": "a"}]')


@pytest.mark.parametrize(
    ("task", "damage", "message"),
    [
        ("gsm8k", damage_line, "train.jsonl, line 2"),
        ("gsm8k", lambda f: None, "train.jsonl is absent"),
        ("e2e", damage_archive, "e2e_aligned.tar.gz cannot be read"),
        ("wikisql", damage_bz2, "group 1: it has no 'sentences'"),
        ("json", no_answer, "train.json, example 1: it has none of output, completion, answer"),
        ("json", lambda f: None, "has none of train.json"),
    ],
)
def test_damage_is_told(task, damage, message, tmp_path):
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_pairs(task, tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_pairs("gsm8k", tmp_path / "none")


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [
        ("alpaca", 4900, 100), ("gsm8k", 7473, 1319), ("e2e", 42061, 547),
        ("wikisql", 56355, 8421), ("boolq", 9427, 3270), ("openbookqa", 4957, 500),
        ("arc_easy", 2251, 2376), ("arc_challenge", 1119, 1172),
    ],
)  # fmt: skip
def test_real_data(task, train, validation, data):
    pairs = load_pairs(task, data)
    assert (len(pairs.train), len(pairs.validation)) == (train, validation)
    assert all(p.prompt and p.answer for p in pairs.validation)


def test_scores():
    assert exact(["A  b", "c"], [["a B"], ["d", "C"]]) == 100
    assert exact(["a", "c"], [["b"], ["c"]]) == 50
    assert number(["so #### 1,200", "none", "x 3"], [["#### 1200"], ["4"], ["#### 4"]]) == 100 / 3
    same = "the quick brown fox jumps over the dog"
    assert bleu([same], [[same, "other"]]) == pytest.approx(100)
    assert bleu(["a b c d e", same], [["v w x y z"], [same]]) < 100
    assert set(SCORES) == {"exact", "number", "bleu"}
