"""What every experiment's command does: arguments, cached programs, errors in the user's words."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console

import jpeft
from experiments.common import runtime
from experiments.common.models import ModelError, cache
from experiments.common.readers import DataError
from experiments.common.report import write_json
from jpeft.hf import CheckpointError

C = TypeVar("C")
USER_ERRORS = (
    DataError,
    ModelError,
    CheckpointError,
    jpeft.TargetError,
    jpeft.LeafError,
    ValueError,
    OSError,
)


def command(
    name: str, config_type: type[C], main: Callable[[C, Console], Any], description: str | None
) -> int:
    """Run an experiment: 0, 2 for a user's error, 130 after Ctrl-C, 143 after SIGTERM.

    In a job of several processes all of them run it, and the first one alone prints.
    """
    from experiments.common.loop import DivergedError, InterruptedRunError
    from sharding.cluster import initialise, is_main

    config = tyro.cli(config_type, description=description)
    if getattr(config, "processes", 1) > 1:
        runtime.share_device()
    try:
        runtime.cache_programs(cache() / "compiled")
    except OSError as e:
        print(f"{name}: compiled programs are not kept for the next run: {e}", file=sys.stderr)
    runtime.one_at_a_time()
    console = Console(markup=False)
    try:
        initialise()
        console = Console(quiet=not is_main(), markup=False)
        main(config, console)
    except InterruptedRunError as e:
        out = getattr(config, "out", None)
        console.print(f"stopped; the checkpoint is in {out}: go on with --resume")
        return 128 + e.args[0]
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (*USER_ERRORS, DivergedError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 2
    return 0


def ready(out: pathlib.Path | None, overwrite: bool) -> None:
    """Make a folder for a result that one go makes. **Raises:** `ValueError` where one stands."""
    if out is None:
        return
    if (out / "result.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a result: pass --overwrite, or another --out")
    out.mkdir(parents=True, exist_ok=True)


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(options, default=str))


def claimable(config: Any, free: Sequence[str] = ()) -> None:
    """Look whether `--out` can be claimed, and change nothing.

    **Raises:** as `claim`.
    """
    if config.out is None:
        if config.resume or config.tensorboard:
            raise ValueError("--resume and --tensorboard need --out")
        return
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with what --out holds, and --overwrite throws it away")
    out: pathlib.Path = config.out
    stamp = out / "config.json"
    begun, finished = stamp.exists(), (out / "result.json").exists()
    if config.resume and begun:
        now = _as_json(dataclasses.asdict(config))
        # An option that came after the run began had its default then.
        before = _as_json({f.name: f.default for f in dataclasses.fields(config)})
        before |= json.loads(stamp.read_text())
        # A run may go on elsewhere: on another mesh, at another stage, in other processes.
        moved = {"resume", "overwrite", "out", "save_every", "mesh", "stage", "processes", *free}
        changed = [k for k in now if k not in moved and before.get(k) != now[k]]
        if changed:
            told = ", ".join(f"{k} was {before.get(k)} and is {now[k]}" for k in changed)
            raise ValueError(f"--resume: this is another run than {out} holds: {told}")
    elif finished and not config.overwrite:
        raise ValueError(f"{out} holds a finished run: pass --overwrite, or another --out")
    elif begun and not config.overwrite:
        raise ValueError(f"{out} holds an unfinished run: pass --resume, or --overwrite")


def claim(config: Any, free: Sequence[str] = ()) -> None:
    """Make `--out` ready; with --resume for what it holds, if it holds anything.

    It is for when all is read and training is to begin: `claimable` can be asked at the start.

    **Arguments:** `free`, what may change with --resume, since runs' names tell it.

    **Raises:** `ValueError` for one that holds a run not to be lost.
    """
    from sharding.cluster import barrier, is_main

    claimable(config, free)
    if config.out is None:
        return
    out: pathlib.Path = config.out
    stamp = out / "config.json"
    begun = stamp.exists()
    barrier("claim")  # every process has looked; the first one writes
    if config.overwrite and begun and is_main():
        for path in [*out.glob("seed*"), out / "runs", stamp, out / "result.json"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not (config.resume and begun):
        if config.resume and is_main():
            print(f"--resume: {out} holds no run, so one begins", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        write_json(stamp, _as_json(dataclasses.asdict(config)))
    barrier("claimed")
