"""A folder of texts as tokens and their tokenizer, made once and kept."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16
from rich.console import Console
from safetensors.numpy import save_file

from experiments.common.long_texts import read_texts
from experiments.common.pretrain_pairs import pairs_of
from experiments.common.pretrain_tokens import (
    Vocabulary,
    save_tokenizer,
    stream,
    train_tokenizer,
    vocabulary_of,
)
from experiments.common.readers import DataError
from experiments.common.report import write_json
from experiments.common.tokens import load_tokenizer
from jpeft._disk import atomically, open_tensors
from jpeft.hf.files import read_json

TOKENS, ABOUT = "tokens.safetensors", "data.json"


@dataclasses.dataclass(frozen=True)
class Data:
    """Texts as streams of tokens.

    **Attributes:** `folder`, with the tokenizer's files; `train` and `validation`, of different
    texts, each of which ends with `vocabulary.end`; `about`, where they come from, and counts.
    """

    folder: pathlib.Path
    vocabulary: Vocabulary
    train: UInt16[np.ndarray, " n"]
    validation: UInt16[np.ndarray, " m"]
    about: Mapping[str, Any]

    @functools.cached_property
    def pairs(self) -> Float[np.ndarray, "v v"]:
        """How often two words stand together in the training texts; the vocabulary's square."""
        return pairs_of(self.train, self.vocabulary.size)


def prepared(
    folder: pathlib.Path | None,
    kept: pathlib.Path,
    *,
    vocabulary: int,
    held_out: int,
    length: int,
    seed: int,
    console: Console,
) -> Data:
    """The tokens of the texts in a folder, out of `kept` where they stand there.

    **Arguments:** `folder`, of `.txt` files or `.tar.xz` files with such, or one that this wrote
    before, or None for what `kept` holds; `vocabulary`, the tokenizer's size; `held_out`, how many
    texts are for validation; `length`, of a row, for the tokenizer's file; `seed`, which texts.

    **Raises:** `DataError` for no folder, no texts or too few, and where `kept` holds others;
    `ValueError` for a vocabulary that is too small.
    """
    if folder is None:
        if not (kept / ABOUT).is_file():
            raise DataError(
                "--data is missing: a folder of texts to learn from (.txt files, or .tar.xz files "
                "with such), or one with the tokens of an earlier run (its --out, data)"
            )
        return _read(kept)
    if (folder / ABOUT).is_file():
        return _read(folder)
    made_of = {
        "files": {p.name: p.stat().st_size for g in ("*.txt", "*.tar.xz") for p in folder.glob(g)},
        "asked": {"vocabulary": vocabulary, "held_out": held_out, "seed": seed},
    }
    if (kept / ABOUT).is_file():
        if made_of.items() <= read_json(kept / ABOUT).items():
            return _read(kept)
        raise DataError(
            f"{kept} holds the tokens of other texts, or of another --vocabulary, --held-out or "
            "--seed, and models beside it may have read them: pass another --out"
        )
    if held_out < 1:
        raise DataError(f"--held-out {held_out}: validation needs at least one text")
    train, held = read_texts(folder, held_out, seed)
    with console.status("training the tokenizer, and reading the texts by it"):
        tokenizer = train_tokenizer(train.values(), vocabulary)
        ids = vocabulary_of(tokenizer)
        streams = {
            "train": stream(tokenizer, train.values(), ids.end),
            "validation": stream(tokenizer, held.values(), ids.end),
        }
    kept.mkdir(parents=True, exist_ok=True)
    # The description is the last to come: with it everything stands.
    save_tokenizer(tokenizer, kept, length)
    atomically({kept / TOKENS: functools.partial(save_file, streams)})
    about: dict[str, Any] = made_of | {
        "source": f"{folder.name}: {len(train)} texts, and {len(held)} for validation",
        "validation": sorted(held),
        "tokens": {name: len(x) for name, x in streams.items()},
        "vocabulary": ids.size,
    }
    write_json(kept / ABOUT, about)
    return _read(kept)


def _read(folder: pathlib.Path) -> Data:
    about = read_json(folder / ABOUT)
    if not (folder / TOKENS).is_file():
        raise DataError(f"{folder} has {ABOUT} without {TOKENS}: remove the folder")
    file = open_tensors(folder / TOKENS)
    train, validation = (file.get_tensor(name) for name in ("train", "validation"))
    vocabulary = vocabulary_of(load_tokenizer(folder))
    return Data(folder, vocabulary, train, validation, about)
