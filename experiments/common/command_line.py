"""A command line that makes a result again, without the folders of the machine that made it."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

RESULTS = ("docs", "results")
# How a run was taken up, and not what it is.
KEPT = ("resume", "overwrite", "save_every", "tensorboard", "processes")


def command_line(module: str, config: Any) -> str:
    """`python -m experiments.MODULE` with the options that are not as they are by default.

    Folders are `DIR`, and those of models `MODELS` with the last three names; a result is written
    to where it stands under docs/results, else to `OUT`.
    """
    words: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in KEPT or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [f"--{flag}", *(_shown(field.name, x) for x in value)]
        else:
            words += [f"--{flag}", _shown(field.name, value)]
    return " ".join(["python -m", f"experiments.{module}", *words])


def without_folders(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary, with None for folders, and models' last three names."""
    about = dataclasses.asdict(config)
    for name, value in about.items():
        if isinstance(value, pathlib.Path):
            about[name] = None
        elif name == "models":
            about[name] = [short(x) for x in value]
    return about


def short(model: str) -> str:
    """The last three names of a directory."""
    return "/".join(pathlib.Path(model).parts[-3:])


def _shown(name: str, value: Any) -> str:
    if name == "out":
        parts = pathlib.Path(value).parts
        places = [i for i in range(len(parts) - 1) if parts[i : i + 2] == RESULTS]
        return "/".join(parts[places[-1] :]) if places else "OUT"
    if isinstance(value, pathlib.Path):
        return "DIR"
    if name == "models" and pathlib.Path(value).is_dir():
        return shlex.quote(f"MODELS/{short(value)}")
    return shlex.quote(str(value))
