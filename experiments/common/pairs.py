"""Prompts with their answers: instructions, sums, descriptions, queries, multiple choice."""

from __future__ import annotations

import bz2
import dataclasses
import json
import pathlib
import re
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

from experiments.common.readers import DataError, read_rows
from experiments.common.sample import SAMPLE
from experiments.common.tasks import TASKS

PairTask = Literal[
    "sample", "alpaca", "gsm8k", "e2e", "wikisql", "boolq", "openbookqa", "arc_easy",
    "arc_challenge", "json",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt, the answer to learn, and all answers that are right."""

    prompt: str
    answer: str
    references: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A task's data; `metrics` are those of generated answers, `source` its files in words."""

    train: list[Pair]
    validation: list[Pair]
    metrics: tuple[str, ...]
    source: str


def load_pairs(task: PairTask, data: pathlib.Path | None) -> Pairs:
    """A task's pairs.

    **Arguments:** `data`, the task's folder, or one that has it under its name; for `json` a folder
    with `train.json` and `test.json`, lists of objects with `instruction` (or `prompt`), `output`
    (or `answer`, `completion`) and perhaps `input`. `sample` needs none.

    **Raises:** `DataError` that names the file and the line.
    """
    if task == "sample":
        train, validation = (_sample(name) for name in ("train", "dev"))
        return Pairs(train, validation, ("exact",), "the sample of this package")
    if data is None:
        raise DataError(f"--task {task} needs --data, the folder with its files")
    folder = next((data / n for n in _FOLDERS.get(task, (task,)) if (data / n).is_dir()), data)
    if not folder.is_dir():
        raise DataError(f"--data {data}: there is no such folder")
    read, metrics = _READERS.get(task, (_instructions, ("exact",)))
    train, validation = read(folder)
    if not train or not validation:
        raise DataError(f"{folder} has no examples of {task}")
    return Pairs(train, validation, metrics, folder.name)


def _sample(name: str) -> list[Pair]:
    rows = read_rows(SAMPLE / f"{name}.tsv", TASKS["sample"])
    words = ("bad", "good")
    return [Pair(f"{r.texts[0]}\nThis is ", words[int(r.label)]) for r in rows]


def _instructions(folder: pathlib.Path) -> tuple[list[Pair], list[Pair]]:
    names = (("train.json", "alpaca_train.json"), ("test.json", "alpaca_eval.json", "dev.json"))
    parts: list[list[Pair]] = []
    for side in names:
        path = next((folder / n for n in side if (folder / n).is_file()), None)
        if path is None:
            raise DataError(f"{folder} has none of {', '.join(side)}")
        rows = _read(path, lambda p: json.loads(p.read_text(encoding="utf-8")))
        if not isinstance(rows, list):
            raise DataError(f"{path} holds no list of examples")
        parts.append([_instruction(path, i, row) for i, row in enumerate(rows, 1)])
    return parts[0], parts[1]


def _instruction(path: pathlib.Path, number: int, row: Any) -> Pair:
    def first(*names: str) -> str:
        for name in names:
            if isinstance(row, Mapping) and isinstance(row.get(name), str):
                return row[name]
        raise DataError(f"{path}, example {number}: it has none of {', '.join(names)}")

    prompt = f"### Instruction:\n{first('instruction', 'prompt')}\n"
    if row.get("input"):
        prompt += f"### Input:\n{row['input']}\n"
    return Pair(f"{prompt}### Response:\n", first("output", "completion", "answer"))


def _gsm8k(folder: pathlib.Path) -> tuple[list[Pair], list[Pair]]:
    return _lines(folder / "train.jsonl"), _lines(folder / "test.jsonl")


def _lines(path: pathlib.Path) -> list[Pair]:
    out: list[Pair] = []
    text = _read(path, lambda p: p.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            out.append(Pair(f"Question: {row['question']}\nAnswer: ", row["answer"]))
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}, line {number}: no object with question and answer") from e
    return out


def _e2e(folder: pathlib.Path) -> tuple[list[Pair], list[Pair]]:
    path = folder / "e2e_aligned.tar.gz"
    parts: dict[str, list[str]] = {}
    wanted = ("src_train.txt", "train.txt", "src_valid.txt", "valid.txt")

    def members(p: pathlib.Path) -> None:
        # Read in memory: nothing of an archive is written anywhere.
        with tarfile.open(p) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                file = archive.extractfile(member) if name in wanted else None
                if file is not None:
                    parts[name] = file.read().decode("utf-8").splitlines()

    _read(path, members)
    missing = [n for n in wanted if n not in parts]
    if missing:
        raise DataError(f"{path} has no {missing[0]}")
    train = _described(path, parts["src_train.txt"], parts["train.txt"])
    grouped: dict[str, list[str]] = {}
    for pair in _described(path, parts["src_valid.txt"], parts["valid.txt"]):
        grouped.setdefault(pair.prompt, []).append(pair.answer)
    return train, [Pair(prompt, refs[0], tuple(refs)) for prompt, refs in grouped.items()]


_FIELD = re.compile(r"__start_(\w+?)__ (.*?) __end_\1__")


def _described(path: pathlib.Path, sources: list[str], targets: list[str]) -> list[Pair]:
    if len(sources) != len(targets):
        raise DataError(f"{path} has {len(sources)} meanings and {len(targets)} texts")
    out: list[Pair] = []
    for source, target in zip(sources, targets, strict=True):
        meaning = ", ".join(f"{name}[{value}]" for name, value in _FIELD.findall(source))
        text = target.split("|||")[0].replace("<eos>", "").strip()
        out.append(Pair(f"{meaning}\nText: ", text))
    return out


def _wikisql(folder: pathlib.Path) -> tuple[list[Pair], list[Pair]]:
    path = folder / "wikisql.json.bz2"
    groups = _read(path, lambda p: json.loads(bz2.decompress(p.read_bytes())))
    parts: dict[str, list[Pair]] = {"train": [], "dev": []}
    for number, group in enumerate(groups, 1):
        try:
            for sentence in group["sentences"]:
                side = parts.get(sentence["question-split"])
                if side is None:
                    continue
                query = group["sql"][0]
                # Longest names first: var1 stands in var10.
                for name in sorted(sentence["variables"], key=len, reverse=True):
                    query = query.replace(name, sentence["variables"][name])
                question = sentence["original"].strip()
                side.append(Pair(f"Question: {question}\nSQL: ", query))
        except (KeyError, TypeError, IndexError) as e:
            raise DataError(f"{path}, group {number}: it has no {e}") from e
    return parts["train"], parts["dev"]


_Reader = Callable[[pathlib.Path], tuple[list[Pair], list[Pair]]]
_READERS: dict[str, tuple[_Reader, tuple[str, ...]]] = {
    "alpaca": (_instructions, ("bleu",)),
    "gsm8k": (_gsm8k, ("number",)),
    "e2e": (_e2e, ("bleu",)),
    "wikisql": (_wikisql, ("exact",)),
    "json": (_instructions, ("exact", "bleu")),
}
_FOLDERS: dict[str, tuple[str, ...]] = {
    "alpaca": ("alpaca", "alpaca_subset"),
    "arc_easy": ("ARC-Easy", "llm_adapters_commonsense/ARC-Easy"),
    "arc_challenge": ("ARC-Challenge", "llm_adapters_commonsense/ARC-Challenge"),
    "boolq": ("boolq", "llm_adapters_commonsense/boolq"),
    "openbookqa": ("openbookqa", "llm_adapters_commonsense/openbookqa"),
}


def _read(path: pathlib.Path, how: Callable[[pathlib.Path], Any]) -> Any:
    try:
        return how(path)
    except FileNotFoundError as e:
        raise DataError(f"{path} is absent") from e
    except (OSError, ValueError, EOFError, tarfile.TarError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
