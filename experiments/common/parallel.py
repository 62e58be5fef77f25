"""Many calls at once, each in a worker process, with its output in a file of its own.

On a GPU a small model's steps are too short to keep the device busy: several processes share it.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

from rich.console import Console

from experiments.common import runtime
from experiments.common.loop import InterruptedRunError

POLL, TELL, TAIL, LAST = 1.0, 30.0, 8, 120.0  # seconds, seconds, lines, seconds


class FailedCallsError(ChildProcessError):
    """Some calls failed; names each with the last lines of its output."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A function with its arguments, both of which can be pickled.

    **Attributes:** `log`, the file that everything it prints is appended to.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: pathlib.Path


@dataclasses.dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: connection.Connection


def run_all(calls: Mapping[str, Call], processes: int, console: Console) -> None:
    """Make every call, up to `processes` of them at once; what a call returns is dropped.

    A worker takes one call after another, in their order. After a call that fails the others go
    on. Ctrl-C and SIGTERM are passed on to the workers as SIGTERM, and waited for.

    **Raises:** `FailedCallsError` when all have ended and some failed; `InterruptedRunError` after
    a signal; `ValueError` for fewer than one process.
    """
    from sharding import stop_on_signals

    if calls and processes < 1:
        raise ValueError(f"processes is how many calls are made at once, at least 1: {processes}")
    waiting = collections.deque(calls.items())
    idle: list[_Worker] = []
    busy: dict[str, _Worker] = {}
    failed: dict[str, str] = {}
    told = time.monotonic()
    with stop_on_signals() as stopping, _dismissed(idle, busy):
        while waiting or busy:
            while waiting and len(busy) < processes:
                name, call = waiting.popleft()
                worker = idle.pop() if idle else _hired()
                busy[name] = worker
                worker.pipe.send((call.log, pickle.dumps((call.function, call.arguments))))
                number = len(calls) - len(waiting)
                console.print(f"{number}/{len(calls)}: {name} begins", highlight=False)
            ready = connection.wait([w.pipe for w in busy.values()], timeout=POLL)
            for name in [n for n, w in busy.items() if w.pipe in ready]:
                worker = busy.pop(name)
                error, seconds = _heard(worker)
                if worker.process.is_alive():
                    idle.append(worker)
                if error:
                    failed[name] = f"{error}\n{tail(calls[name].log)}"
                ended = f"failed: {error}" if error else f"done in {seconds:,.0f} s"
                console.print(f"{name} {ended}", highlight=False, markup=False)
            if stopping():
                raise InterruptedRunError(stopping())
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                for name in busy:
                    line = tail(calls[name].log, 1)
                    console.print(f"{name}: {line}", highlight=False, markup=False)
    if failed:
        each = "\n".join(f"--- {name}: {text}" for name, text in failed.items())
        raise FailedCallsError(f"{len(failed)} of {len(calls)} runs failed\n{each}")


def tail(log: pathlib.Path, lines: int = TAIL) -> str:
    """The last lines of a file that are not empty; an empty text where there is no file."""
    if not log.is_file():
        return ""
    found = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([x.rstrip() for x in found if x.strip()][-lines:])


def _hired() -> _Worker:
    import jax

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    programs = getattr(jax.config, "jax_compilation_cache_dir", None)
    process = context.Process(target=_work, args=(theirs, programs), daemon=True)
    process.start()
    theirs.close()  # so that a worker's death closes the pipe
    return _Worker(process, ours)


def _heard(worker: _Worker) -> tuple[str, float]:
    """A call's error, empty where it went well, and its seconds."""
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        return f"the process ended with exit code {worker.process.exitcode}", 0.0


@contextmanager
def _dismissed(idle: list[_Worker], busy: dict[str, _Worker]) -> Generator[None]:
    """No worker is left when the block ends, however it ends."""
    try:
        yield
    finally:
        for worker in busy.values():
            worker.process.terminate()
        for worker in (*idle, *busy.values()):
            worker.pipe.close()
        for worker in (*idle, *busy.values()):
            worker.process.join(LAST)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _work(pipe: connection.Connection, programs: str | None) -> None:
    """A worker: calls come through the pipe until it is closed."""
    # Ctrl-C then reaches the first process alone, which tells this one, and once.
    os.setsid()
    threading.Thread(target=_orphaned, daemon=True).start()
    runtime.share_device()
    runtime.one_at_a_time()
    if programs:
        runtime.cache_programs(pathlib.Path(programs))
    while True:
        try:
            log, pickled = pipe.recv()
        except (EOFError, ConnectionError):
            return
        _redirect(log)
        start, error = time.perf_counter(), ""
        try:
            function, arguments = pickle.loads(pickled)
            function(*arguments)
        except InterruptedRunError:
            return
        except Exception as e:  # whatever it is, the other calls go on
            traceback.print_exc()
            error = f"{type(e).__name__}: {e}"
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send((error, time.perf_counter() - start))


def _redirect(log: pathlib.Path) -> None:
    """Everything that this process prints, the compiler's messages too, goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _orphaned() -> None:
    """Stop as by SIGTERM when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
