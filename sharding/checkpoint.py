"""Checkpoints of a training state, on any devices, that a job goes on from after it was killed.

Orbax writes them: each process its own shards, in the background, and a checkpoint appears whole,
by a rename, or not at all. Beside them is a sum of every array's bits: Orbax takes what the disk
gives it, and a bit that has changed would go on as another number.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import pathlib
import threading
import weakref
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sharding._first_line import first_line
from sharding.checkpoint_bits import bit_sums, is_hosted, is_key, named, plain
from sharding.checkpoint_bits import fingerprint as fingerprint
from sharding.checkpoint_errors import CheckpointError as CheckpointError
from sharding.checkpoint_errors import is_damage
from sharding.cluster import barrier, is_main, largest
from sharding.offload import HOST

logger = logging.getLogger("sharding")
FORMAT = 2


class Checkpoints:
    """The checkpoints in a folder, the newest few.

    Use it in a `with` block, or call `close` at the end: both wait for what is being written, and
    raise what went wrong. A program that ends without either waits too, and logs it.

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
        self._passed: set[int] = set()
        # `atexit` is too late: from the end of the main thread Orbax's threads get no more work.
        threading._register_atexit(_finish, weakref.ref(self._manager))  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait until what was saved is on the disk, and end what writes it; once more is no harm.

        **Raises:** what kept it from being written.
        """
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def save(self, step: int, state: Any, about: Any = None) -> None:
        """Save a state; one of that step that is there already stays.

        What `restore` passed over as damaged is set aside first: `3` becomes `3.damaged`.

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
        self._set_aside()
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
        passed over, with a warning. Nothing is removed.

        **Arguments:** `like`, a tree of arrays or of `jax.ShapeDtypeStruct`s with shardings: other
        devices, and another number of processes, than those that saved.

        **Raises:** `CheckpointError` where there is none, where none can be read, for one of
        another tree or another base, and for shardings that do not divide its arrays; what the
        machine raised where that is no damage: no memory, no right to read, a disk that fails.
        """
        _check_places(like)
        self.wait()
        known = {s for s in self._manager.all_steps() if step in (None, s)}
        damage, passed = "", set[int]()
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
                self._passed = (self._passed | passed) - {number}
                return found
            passed.add(number)
        if not damage:
            told = "" if step is None else f" of step {step}"
            damage = f"{self.folder} holds no checkpoint{told}"
        raise CheckpointError(damage)

    def _try(self, step: int, like: Any) -> tuple[Any, str]:
        """The state and `about` of a step, or what is wrong with it, of which processes agree."""
        state, note, failure = None, {}, None
        try:
            state, note = self._read(step, like)
        except Exception as e:  # Orbax and TensorStore have no error of their own for damage
            failure = e
        where = self.folder / str(step)
        # Each reads its own shards: where one cannot, the others must not go on without it.
        severity = 0 if failure is None else 1 if is_damage(failure) else 2
        worst = largest(severity)
        if worst == 2:
            if failure is not None and severity == 2:
                raise failure
            raise CheckpointError(f"{where} was not read: another process tells why") from failure
        if worst == 0:
            sums = bit_sums(named(state))
            wrong = [n for n, number in note["sums"].items() if sums[n] != number]
            if not largest(int(bool(wrong))):
                return (state, note["about"]), ""
            damage = f"not what was saved: {', '.join(wrong[:5])}" if wrong else ""
        else:
            damage = "" if failure is None else first_line(failure)
        damage = damage or "another process cannot read it"
        return None, f"{where} cannot be read: {damage}"

    def _set_aside(self) -> None:
        """Rename what was passed over when this run went on: it would stand in the run's way."""
        if not self._passed:
            return
        for number in sorted(self._passed) if is_main() else ():
            old = self.folder / str(number)
            names = (f"{number}.damaged{n or ''}" for n in itertools.count())
            new = next(p for n in names if not (p := self.folder / n).exists())
            logger.warning("%s is set aside as %s: the run went on without it", old, new.name)
            old.rename(new)
        barrier("damaged checkpoints are set aside")
        self._manager.reload()
        self._passed.clear()

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


def _finish(manager: weakref.ref[ocp.CheckpointManager]) -> None:
    """At the end of a program: an error here would keep others from ending what they do."""
    found = manager()
    if found is None:
        return
    try:
        found.wait_until_finished()
    except Exception:
        logger.exception("%s: the last checkpoint was not written", found.directory)


def _check_places(like: Any) -> None:
    for name, x in named(like).items():
        where = _place(x)
        try:
            _ = None if where is None else where.shard_shape(x.shape)
        except ValueError as e:
            raise CheckpointError(f"{name} cannot stand where it is to: {first_line(e)}") from e


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
    if sharding is None:
        return jnp.asarray(found)
    placed = jax.device_put(found, sharding)
    # On one device Orbax's arrays have not the type of the memory that they are in.
    typed = sharding.memory_kind != HOST or is_hosted(placed)
    return placed if typed else jax.device_put(placed, jax.memory.Space.Host)


def _place(x: Any) -> Any:
    """Where an array has to stand; None where JAX may put it anywhere."""
    anywhere = isinstance(x, jax.Array) and not x.committed
    return None if anywhere else getattr(x, "sharding", None)
