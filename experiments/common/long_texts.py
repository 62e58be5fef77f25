"""Long texts out of a folder, tokens of them, and rows of tokens."""

from __future__ import annotations

import functools
import lzma
import pathlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.readers import DataError
from experiments.common.sample import SAMPLE

Encode = Callable[[Sequence[str]], list[int]]
"""Words to the token ids of the text that they are, one space between them."""
_MOST = 2**31  # bytes that an archive's texts may have: a small file can tell of any size


def read_texts(
    folder: pathlib.Path | None, held_out: int, seed: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Texts by name, to train on and to evaluate with: no text is in both.

    **Arguments:** `folder`, of `.txt` files or `.tar.xz` files with such, which are read in memory
    and never unpacked; None is the sample of this package, with its own two parts; `held_out`, how
    many texts to evaluate with; `seed`, which.

    **Raises:** `DataError`.
    """
    if folder is None:
        train, held = (_sample(part) for part in ("train", "dev"))
        return {"train": train}, {"dev": held}
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder")
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("*.txt")):
        texts[path.name] = _decoded(path.read_bytes(), str(path))
    for path in sorted(folder.glob("*.tar.xz")):
        texts |= _archived(path)
    if len(texts) <= held_out:
        raise DataError(
            f"--data {folder} holds {len(texts)} texts (.txt, or .tar.xz with such): more than the "
            f"{held_out} of --held-out are needed"
        )
    names = [sorted(texts)[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    return {n: texts[n] for n in names[held_out:]}, {n: texts[n] for n in names[:held_out]}


def _sample(part: str) -> str:
    lines = (SAMPLE / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
    return " ".join(line.split("\t")[0] for line in lines)


def _archived(path: pathlib.Path) -> dict[str, str]:
    """The regular `.txt` members; their names are labels, and no path is made of them."""
    out: dict[str, str] = {}
    size = 0
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                if not member.isfile() or not member.name.endswith(".txt"):
                    continue
                size += member.size
                if size > _MOST:
                    raise DataError(f"{path} holds more than {_MOST / 2**30:g} GiB of texts")
                file = archive.extractfile(member)
                assert file is not None  # a regular file has contents
                name = pathlib.PurePosixPath(member.name).name
                out[name] = _decoded(file.read(), f"{path}, {member.name}")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
        raise DataError(f"{path} is no whole .tar.xz: {e}") from e
    return out


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where} is not UTF-8 text: {e.reason} at byte {e.start}") from e


def read_encoder(model: pathlib.Path | None, vocabulary: pathlib.Path | None, size: int) -> Encode:
    """The tokenizer of a model with `size` embeddings; bytes where there is no model.

    **Arguments:** `model`, a directory with its tokenizer, or a file of llama2.c, which needs
    `vocabulary`, its tokenizer's file.

    **Raises:** `ValueError` where the two do not fit; `ModelError` and `CheckpointError` where
    there is none.
    """
    if model is None or model.is_dir():
        if vocabulary is not None:
            raise ValueError("--vocabulary goes with a --model in llama2.c's format")
        if model is None:
            return lambda words: list(" ".join(words).encode())
        from experiments.common.tokens import load_tokenizer

        tokenizer = load_tokenizer(model)
        return lambda words: tokenizer.encode(" ".join(words), add_special_tokens=False).ids
    if vocabulary is None:
        raise ValueError(f"--model {model} needs --vocabulary, the .bin of its tokenizer")
    return _by_word(vocabulary, size)


def _by_word(path: pathlib.Path, size: int) -> Encode:
    from jpeft.models.llama2c import Vocabulary

    if not path.is_file():
        raise ValueError(f"--vocabulary {path}: there is no such file")
    pieces = Vocabulary.read(path, size)
    # Each has a score and a length of four bytes, after the file's first four.
    whole = 4 + sum(8 + len(p) for p in pieces.pieces)
    if path.stat().st_size != whole:
        raise ValueError(f"--vocabulary {path} holds more than the model's {size} pieces")

    # No piece reaches over a space but at its start, so words encode as their text would; the time
    # of `Vocabulary.encode` grows with the square of the text, and most words come again.
    @functools.cache
    def word(text: str) -> list[int]:
        return pieces.encode(text)[1:]

    return lambda words: [i for w in words for i in word(w)]


def draw_rows(
    texts: Mapping[str, str], encode: Encode, count: int, length: int, rng: Any
) -> np.ndarray:
    """Rows of `length` tokens from random places of random texts, int32 `(count, length)`.

    White space counts as one space. **Raises:** `DataError` for a text that is too short.
    """
    names = list(texts)
    chosen, places = rng.integers(len(names), size=count), rng.random(count)
    rows = np.empty((count, length), np.int32)
    for i in np.unique(chosen):
        words = texts[names[i]].split()
        for row in np.flatnonzero(chosen == i):
            # A word has at least one token: so many words suffice, where there are so many.
            start = int(places[row] * max(1, len(words) - length + 1))
            ids = encode(words[start : start + length])
            if len(ids) < length:
                raise DataError(
                    f"{names[i]} has fewer than the {length} tokens of a row: give longer texts, "
                    "or a lower --length"
                )
            rows[row] = ids[:length]
    return rows
