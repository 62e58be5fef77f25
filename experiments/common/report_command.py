"""The command that made a result, made again from the configuration in its file."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from experiments.common.report_read import Result

# What says where files were, or how a run was taken up: nothing of what it did.
LEFT_OUT = {"out", "resume", "overwrite", "processes", "tensorboard", "save_every"}
# Results without a configuration: what they were asked for.
BARE = {"qlora": ["--report-65b"]}
# Experiments whose results do not tell where the data was.
UNTOLD = {"precision": ["--data", "DIR"]}


def command_of(result: Result, root: str = "docs/results") -> str:
    """A line for the shell; data stands as DIR, the folder of a family of models as MODELS."""
    config = result.data.get("config")
    words = BARE.get(result.experiment, []) if config is None else _flags(result.experiment, config)
    line = ["python", "-m", f"experiments.{result.experiment}", *words]
    fraction = result.data.get("limit_fraction")
    limit = f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} " if fraction else ""
    return limit + shlex.join([*line, "--out", f"{root}/{result.name}"])


def _flags(experiment: str, config: Mapping[str, Any]) -> list[str]:
    defaults = _defaults(experiment)
    out: list[str] = []
    for name, value in config.items():
        if name in LEFT_OUT or (defaults and name not in defaults):
            continue  # no option, or no longer one
        if _same(value, defaults.get(name)):
            continue
        flag = name.replace("_", "-")
        if value is None:
            out += [f"--{flag}", "None"]
        elif isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            within = "MODELS/" if name == "models" else ""
            out += [f"--{flag}", *(f"{within}{x}" if "/" in str(x) else str(x) for x in value)]
        elif name == "model" and re.search(r"^\w[^/]*/[^/]+/[^/]+$", str(value)):  # of a family
            out += [f"--{flag}", f"MODELS/{value}"]
        else:
            out += [f"--{flag}", "DIR" if name == "data" else _told(value)]
    return out + UNTOLD.get(experiment, [])


def _defaults(experiment: str) -> dict[str, Any]:
    """The options' own values; empty where there is no such experiment."""
    try:
        module = importlib.import_module(f"experiments.{experiment}")
    except ImportError:
        return {}
    config = getattr(module, "Config", None)
    if not dataclasses.is_dataclass(config):
        return {}
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        out[field.name] = field.default if made is dataclasses.MISSING else made()
    return out


def _same(value: Any, default: Any) -> bool:
    return value == (list(default) if isinstance(default, tuple) else default)


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    # A file's name, without where it was on the machine that ran it; `owner/name` is the hub's.
    text = str(value)
    is_path = text.startswith((".", "/")) or text.count("/") > 1
    return pathlib.PurePath(text).name if is_path else text
