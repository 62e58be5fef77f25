"""Checkpoints of a training state, on any devices, that a job goes on from after it was killed.

Orbax writes them: each process its own shards, in the background, and a checkpoint appears whole,
by a rename, or not at all. Beside them is a sum of every array's bits: Orbax takes what the disk
gives it, and a bit that has changed would go on as another number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sharding.checkpoint_bits import bit_sums, is_key, named, plain
from sharding.checkpoint_bits import fingerprint as fingerprint
from sharding.cluster import largest

logger = logging.getLogger("sharding")
FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is of something else."""


class Checkpoints:
    """The checkpoints in a folder, the newest few.

    **Arguments:** `folder`, one that every process sees; `keep`, how many; `asynchronous`, write in
    the background, while training goes on; `base`, the `fingerprint` of the frozen parameters: they
    are not in the checkpoint, and one that was made with others is refused.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep: int = 3,
        asynchronous: bool = True,
        base: str | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep counts checkpoints, at least 1: {keep}")
        self.folder, self.base = pathlib.Path(folder).resolve(), base
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._damaged: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def save(self, step: int, state: Any, about: Any = None) -> None:
        """Save a state; one of that step that is there already stays, unless it was damaged.

        **Arguments:** `state`, a tree of arrays, PRNG keys among them; `about`, what JSON can hold:
        where the data stand, for one.

        **Raises:** `CheckpointError` for a step before the newest one; `TypeError` for an `about`
        that JSON cannot hold.
        """
        found = named(state)
        note: dict[str, Any] = {
            "format": FORMAT,
            "arrays": {n: [list(x.shape), str(x.dtype)] for n, x in found.items()},
            "keys": {n: str(jax.random.key_impl(x)) for n, x in found.items() if is_key(x)},
            "base": self.base,
            "about": about,
        }
        try:
            json.dumps(note)
        except (TypeError, ValueError) as e:
            raise TypeError(f"`about` of step {step} must be what JSON can hold: {e}") from e
        # What was passed over when this run went on would stand in its way, and be passed over.
        for number in sorted(self._damaged):
            logger.warning("%s is removed: the run went on without it", self.folder / str(number))
            self._manager.delete(number)
        self._damaged.clear()
        if step in self._manager.all_steps():
            return
        newest = self.latest()
        if newest is not None and step < newest:
            raise CheckpointError(
                f"{self.folder} holds step {newest}, and this one is {step}: a run that goes back "
                "needs another folder, or the newer checkpoints removed"
            )
        note["sums"] = bit_sums(found)
        note["digest"] = _digest(note)
        arrays = {n: _shared(plain(x)) for n, x in found.items()}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),  # type: ignore[call-arg]
            note=ocp.args.JsonSave(note),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=args)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any]:
        """A state like `like`, where its shardings say, and `about`.

        Without a step it is the newest one that can be read, by every process: a damaged one is
        passed over, with a warning.

        **Arguments:** `like`, a tree of arrays or of `jax.ShapeDtypeStruct`s with shardings: other
        devices, and another number of processes, than those that saved.

        **Raises:** `CheckpointError` where there is none, where none can be read, and for one of
        another tree or another base.
        """
        self.wait()
        known = {s for s in self._manager.all_steps() if step in (None, s)}
        damage = ""
        while (number := largest(max(known, default=-1))) >= 0:
            if largest(int(number not in known)):
                raise CheckpointError(
                    f"some processes find step {number} in {self.folder}, and others do not: it "
                    "must be a folder that all of them share"
                )
            known.remove(number)
            if damage:
                logger.warning("%s; the one before it is taken", damage)
            found, damage = self._try(number, like)
            if not damage:
                return found
            self._damaged.add(number)
        if not damage:
            told = "" if step is None else f" of step {step}"
            damage = f"{self.folder} holds no checkpoint{told}"
        raise CheckpointError(damage)

    def _try(self, step: int, like: Any) -> tuple[Any, str]:
        """The state and `about` of a step, or what is wrong with it, of which processes agree."""
        state, note, damage = None, {}, ""
        try:
            state, note = self._read(step, like)
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and TensorStore have no error of their own for damage
            damage = _first_line(e)
        # Each reads its own shards: where one cannot, the others must not go on without it.
        if not largest(int(bool(damage))):
            sums = bit_sums(named(state))
            wrong = [n for n, number in note["sums"].items() if sums[n] != number]
            if not largest(int(bool(wrong))):
                return (state, note["about"]), ""
            damage = f"not what was saved: {', '.join(wrong[:5])}" if wrong else ""
        damage = damage or "another process cannot read it"
        return None, f"{self.folder / str(step)} cannot be read: {damage}"

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """What this process is to have of a step. Nothing here waits for the other processes.

        Orbax's manager does, at the end of reading: where one has failed, the others would wait.
        """
        where = self._manager.directory / str(step)
        args: Any = ocp.args.JsonRestore()  # type: ignore[call-arg]
        note: Any = ocp.JsonCheckpointHandler().restore(where / "note", args=args)
        if note.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.folder / str(step)} is of format {note.get('format')}, not {FORMAT}"
            )
        if note.pop("digest", None) != _digest(note):
            raise ValueError("its note is not what was saved")
        self._check(step, note, like)
        wanted = named(like)
        args = ocp.args.StandardRestore(  # type: ignore[call-arg]
            {n: _abstract(x) for n, x in wanted.items()}
        )
        found: Any = ocp.StandardCheckpointHandler().restore(where / "arrays", args=args)
        leaves = [_as(found[n], x, note["keys"].get(n)) for n, x in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), note

    def _check(self, step: int, note: dict[str, Any], like: Any) -> None:
        where = self.folder / str(step)
        if self.base is not None and note["base"] not in (None, self.base):
            raise CheckpointError(
                f"{where} was trained on other frozen parameters (fingerprint {note['base']}, "
                f"these have {self.base})"
            )
        have, want = note["arrays"], named(like)
        problems = [f"missing: {n}" for n in want if n not in have]
        problems += [f"unexpected: {n}" for n in have if n not in want]
        for n, x in want.items():
            if n in have and have[n] != [list(x.shape), str(x.dtype)]:
                shape, dtype = have[n]
                problems.append(f"{n} is {dtype}{shape}, not {x.dtype}{list(x.shape)}")
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(f"{where} holds another state:\n  {shown}{more}")


def _digest(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()[:16]


def _shared(x: Any) -> Any:
    """An array that is each process's own, and the same in all, as one that the first one saves."""
    own = isinstance(x, jax.Array) and x.is_fully_addressable
    return np.asarray(x) if own and jax.process_count() > 1 else x


def _abstract(x: Any) -> Any:
    """What Orbax is told to make."""
    sharding = _place(x)
    if is_key(x):
        x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
    if sharding is None or (sharding.is_fully_addressable and jax.process_count() > 1):
        return np.empty(x.shape, x.dtype)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _as(found: Any, like: Any, key: str | None) -> Any:
    sharding = _place(like)
    if key is not None:
        found = jax.random.wrap_key_data(jnp.asarray(found), impl=key)
    elif isinstance(like, np.ndarray):
        return found
    return jnp.asarray(found) if sharding is None else jax.device_put(found, sharding)


def _place(x: Any) -> Any:
    """Where an array has to stand; None where JAX may put it anywhere."""
    anywhere = isinstance(x, jax.Array) and not x.committed
    return None if anywhere else getattr(x, "sharding", None)


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
