"""GLUE's tasks: their labels, metrics and columns, and where their rows are found."""

from __future__ import annotations

import dataclasses
import pathlib

from experiments.common.readers import DataError, Row, read_rows, read_table
from experiments.common.sample import SAMPLE

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    **Attributes:** `labels`, the names by number, empty for a regression; `metrics`, GLUE's, the
    first being the one to compare by; `text`, the columns of the one or two texts, `label`, of the
    answer, each with its spellings; `folder`, the name in GLUE's own download; `bare`, the columns'
    names in files without a header.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    text: tuple[tuple[str, ...], ...]
    label: tuple[str, ...] = ("label",)
    folder: str = ""
    bare: tuple[str, ...] = ()


SENTENCES = (("sentence1", "text_a"), ("sentence2", "text_b"))
TASKS = {
    t.name: t
    for t in (
        Task(
            "sst2",
            BINARY,
            ("accuracy",),
            (("sentence", "text_a"),),
            folder="SST-2",
            bare=("sentence", "label"),
        ),
        Task(
            "mrpc",
            BINARY,
            ("accuracy", "f1"),
            (("#1 String", "sentence1", "text_a"), ("#2 String", "sentence2", "text_b")),
            ("Quality", "label"),
            "MRPC",
        ),
        Task(
            "cola",
            BINARY,
            ("matthews", "accuracy"),
            (("sentence", "text_a"),),
            folder="CoLA",
            bare=("source", "label", "mark", "sentence"),
        ),
        Task("rte", ENTAILMENT, ("accuracy",), SENTENCES, folder="RTE"),
        Task("stsb", (), ("pearson", "spearman"), SENTENCES, ("score", "label"), "STS-B"),
        Task(
            "qnli",
            ENTAILMENT,
            ("accuracy",),
            (("question", "text_a"), ("sentence", "text_b")),
            folder="QNLI",
        ),
        Task(
            "qqp",
            BINARY,
            ("accuracy", "f1"),
            (("question1", "text_a"), ("question2", "text_b")),
            ("is_duplicate", "label"),
            "QQP",
        ),
        Task(
            "mnli",
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            SENTENCES,
            ("gold_label", "label"),
            "MNLI",
        ),
        Task("sample", BINARY, ("accuracy",), (("sentence",),), bare=("sentence", "label")),
    )
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A task's rows, and in words where they came from."""

    task: Task
    train: list[Row]
    validation: list[Row]
    source: str


TRAIN = ("train.tsv", "in_domain_train.tsv", "msr_paraphrase_train.txt", "train.json")
VALIDATION = (
    ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
    ("glue_dev.tsv",),
    ("dev_matched.tsv",),
    ("MRPC_glue_dev.tsv",),
    ("dev.tsv",),
    ("dev.json",),
    ("msr_paraphrase_test.txt",),
)


def load(name: str, data: pathlib.Path | None) -> Dataset:
    """The task's rows, from a folder, or for `sample` from this package.

    **Arguments:** `data`, a folder with the task's files, or one that has it under GLUE's name for
    the task, or under `name`; None fetches GLUE from the Hugging Face hub.

    **Raises:** `DataError` that names the file, and the line or column.
    """
    task = TASKS[name]
    if name == "sample":
        parts = {p: read_rows(SAMPLE / f"{p}.tsv", task) for p in ("train", "dev")}
        return Dataset(task, parts["train"], parts["dev"], "the sample of this package")
    if data is None:
        from experiments.common.hub import fetch_glue

        return fetch_glue(task)
    named = (data / n for n in (task.folder, name, f"{name}_sentence") if n)
    folder = next((f for f in named if f.is_dir()), data)
    if not folder.is_dir():
        raise DataError(f"--data {data}: there is no such folder")
    train = next((folder / f for f in TRAIN if (folder / f).is_file()), None)
    if train is None:
        raise DataError(f"{folder} has none of {', '.join(TRAIN)}: is it the {name} data?")
    validation = _validation(folder, task)
    rows = read_rows(train, task)
    held = [row for path in validation for row in read_rows(path, task)]
    known = {row.id for row in held if row.id}
    kept = [row for row in rows if not row.id or row.id not in known]
    source = f"{_in(folder, train)} and {' + '.join(_in(folder, p) for p in validation)}"
    if len(kept) < len(rows):
        source += f", less {len(rows) - len(kept):,} rows of train that stand in validation"
    return Dataset(task, kept, held, source)


def _validation(folder: pathlib.Path, task: Task) -> list[pathlib.Path]:
    test = folder / "test.tsv"
    if task.name == "sst2" and (folder / "dev.tsv").is_file() and test.is_file():
        # A re-split of GLUE's train set whose labelled test is GLUE's own dev set.
        header, _ = read_table(folder / "dev.tsv", task.bare)
        tested, _ = read_table(test, ())
        if header == ["sentence", "label"] == tested:
            return [test]
    if task.name == "mrpc":
        glue = folder.parent / "glue_subsets" / "MRPC_glue_dev.tsv"
        if not (folder / "dev.tsv").is_file() and glue.is_file():
            return [glue]
    for names in VALIDATION:
        found = [folder / n for n in names if (folder / n).is_file()]
        if len(found) == len(names):
            return found
    raise DataError(f"{folder} has no validation file: none of {VALIDATION[4:]} and the like")


def _in(folder: pathlib.Path, path: pathlib.Path) -> str:
    return f"{path.parent.name}/{path.name}"
