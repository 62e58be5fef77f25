"""Checkpoints of a training state, on any devices, that a job goes on from after it was killed.

Orbax writes them: each process its own shards, in the background, and a checkpoint appears whole,
by a rename, or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logger = logging.getLogger("sharding")
FORMAT = 1


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
        """Save a state; one of that step that is there already stays.

        **Arguments:** `state`, a tree of arrays, PRNG keys among them; `about`, what JSON can hold:
        where the data stand, for one.
        """
        if step in self._manager.all_steps():
            return
        arrays = {n: _shared(_plain(x)) for n, x in _named(state).items()}
        note = {
            "format": FORMAT,
            "arrays": {n: [list(x.shape), str(x.dtype)] for n, x in _named(state).items()},
            "keys": {
                n: str(jax.random.key_impl(x)) for n, x in _named(state).items() if _is_key(x)
            },
            "base": self.base,
            "about": about,
        }
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),  # type: ignore[call-arg]
            note=ocp.args.JsonSave(note),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=args)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any]:
        """A state like `like`, where its shardings say, and `about`.

        Without a step it is the newest one that can be read: a damaged one is passed over, with a
        warning.

        **Arguments:** `like`, a tree of arrays or of `jax.ShapeDtypeStruct`s with shardings: other
        devices, and another number of processes, than those that saved.

        **Raises:** `CheckpointError` where there is none, where none can be read, and for one of
        another tree or another base.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not steps or (step is not None and step not in self._manager.all_steps()):
            raise CheckpointError(
                f"{self.folder} holds no checkpoint" + ("" if step is None else f" of step {step}")
            )
        for number in steps:
            try:
                return self._read(number, like)
            except CheckpointError:
                raise
            except Exception as e:
                damage = f"{self.folder / str(number)} cannot be read: {_first_line(e)}"
                if number == steps[-1]:
                    raise CheckpointError(damage) from e
                logger.warning("%s; the one before it is taken", damage)
        raise AssertionError

    def _read(self, step: int, like: Any) -> tuple[Any, Any]:
        args: Any = ocp.args.Composite(note=ocp.args.JsonRestore())  # type: ignore[call-arg]
        note = self._manager.restore(step, args=args)["note"]
        self._check(step, note, like)
        named = _named(like)
        wanted = {n: _abstract(x) for n, x in named.items()}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(wanted)  # type: ignore[call-arg]
        )
        found = self._manager.restore(step, args=args)["arrays"]
        keys = note["keys"]
        leaves = [_as(found[n], x, keys.get(n)) for n, x in named.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), note["about"]

    def _check(self, step: int, note: dict[str, Any], like: Any) -> None:
        where = self.folder / str(step)
        if note.get("format") != FORMAT:
            raise CheckpointError(f"{where} is of format {note.get('format')}, not {FORMAT}")
        if self.base is not None and note["base"] not in (None, self.base):
            raise CheckpointError(
                f"{where} was trained on other frozen parameters (fingerprint {note['base']}, "
                f"these have {self.base})"
            )
        have, want = note["arrays"], _named(like)
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


def fingerprint(tree: Any) -> str:
    """A short name of a tree's exact contents: paths, shapes, types, and sums of their bits.

    Sums of integers do not depend on how arrays are sharded. It reads every array once.
    """
    digest = hashlib.sha256()
    for name, x in sorted(_named(tree).items()):
        plain = _plain(x)
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} {int(_bit_sum(plain))}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _bit_sum(x: Any) -> Any:
    """The sum of an array's bits, read as whole numbers and weighed by place, modulo 2^32."""
    if jnp.issubdtype(x.dtype, jnp.bool_):
        x = x.astype(jnp.uint8)
    elif not jnp.issubdtype(x.dtype, jnp.integer):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    # Weighed, so that two numbers which change places are seen.
    weight = jnp.uint32(1)
    for axis in range(x.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weight = weight * jnp.uint32(31) + place
    return jnp.sum(x.astype(jnp.uint32) * (2 * weight + 1), dtype=jnp.uint32)


def _named(tree: Any) -> dict[str, Any]:
    """Arrays by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    out = {jax.tree_util.keystr(p, simple=True, separator="/") or "array": x for p, x in flat}
    if len(out) != len(flat):
        raise ValueError("two arrays of the state have the same path")
    return out


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _shared(x: Any) -> Any:
    """An array that is each process's own, and the same in all, as one that the first one saves."""
    own = isinstance(x, jax.Array) and x.is_fully_addressable
    return np.asarray(x) if own and jax.process_count() > 1 else x


def _abstract(x: Any) -> Any:
    """What Orbax is told to make."""
    sharding = _place(x)
    if _is_key(x):
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
