"""What every experiment's command does: arguments, cached programs, errors in the user's words."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
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
    """Run an experiment: 0, 2 for a user's error, 130 after Ctrl-C."""
    from experiments.common.loop import DivergedError, InterruptedRunError

    config = tyro.cli(config_type, description=description)
    runtime.cache_programs(cache() / "compiled")
    console = Console()
    try:
        main(config, console)
    except InterruptedRunError:
        out = getattr(config, "out", None)
        console.print(f"stopped; the checkpoint is in {out}: go on with --resume")
        return 130
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (*USER_ERRORS, DivergedError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 2
    return 0


def claim(config: Any) -> None:
    """Make `--out` ready. **Raises:** `ValueError` for one that holds a run not to be lost."""
    if config.out is None:
        if config.resume or config.tensorboard:
            raise ValueError("--resume and --tensorboard need --out")
        return
    out: pathlib.Path = config.out
    stamp = out / "config.json"
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if config.overwrite and stamp.exists():
        for path in [*out.glob("seed*"), out / "runs", stamp, out / "result.json"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if config.resume:
        if not stamp.exists():
            raise ValueError(f"--resume: {out} holds no run")
        before, free = json.loads(stamp.read_text()), {"resume", "overwrite", "out", "save_every"}
        changed = [k for k in now if k not in free and before.get(k) != now[k]]
        if changed:
            told = ", ".join(f"{k} was {before.get(k)} and is {now[k]}" for k in changed)
            raise ValueError(f"--resume: this is another run than {out} holds: {told}")
    elif (out / "result.json").exists():
        raise ValueError(f"{out} holds a finished run: pass --overwrite, or another --out")
    elif stamp.exists():
        raise ValueError(f"{out} holds an unfinished run: pass --resume, or --overwrite")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(stamp, now)
