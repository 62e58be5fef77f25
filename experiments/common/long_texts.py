"""Long texts out of a folder, tokens of them, and rows of tokens."""

from __future__ import annotations

import lzma
import pathlib
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.common.readers import DataError
from experiments.common.sample import SAMPLE
from sharding.cluster import largest

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


def draw_rows(
    texts: Mapping[str, str],
    encode: Callable[[str], list[int]],
    count: int,
    length: int,
    rng: Any,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of `length` tokens from random places of random texts, int32 `(count, length)`.

    White space counts as one space. Every process of a job must ask at the same place.

    **Arguments:** `own`, numbers of the rows to be made, ascending: then there are no others.

    **Raises:** `DataError` for a text that is too short, in every process.
    """
    names = list(texts)
    chosen, places = rng.integers(len(names), size=count), rng.random(count)
    if own is not None:
        chosen, places = chosen[own], places[own]
    rows = np.empty((len(chosen), length), np.int32)
    short = -1
    for i in np.unique(chosen):
        words = texts[names[i]].split()
        for row in np.flatnonzero(chosen == i):
            # A word has at least one token: so many words suffice, where there are so many.
            start = int(places[row] * max(1, len(words) - length + 1))
            ids = encode(" ".join(words[start : start + length]))
            if len(ids) < length:
                short = int(i)
                break
            rows[row] = ids[:length]
    short = largest(short)
    if short >= 0:
        raise DataError(
            f"{names[short]} has fewer than the {length} tokens of a row: give longer texts, "
            "or a lower --length"
        )
    return rows
