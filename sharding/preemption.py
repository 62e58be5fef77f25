"""A signal to stop, taken between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from sharding.cluster import largest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Generator[Callable[[], int]]:
    """Ctrl-C and SIGTERM, which announces a preemption, let the running step end.

    What it gives returns the number of the signal that came, to this process or to another one of
    the job, or 0: every process has to ask after each step, and they hear the same. A second signal
    stops at once, by `KeyboardInterrupt`. Outside of the main thread signals are not ours.
    """
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    old: dict[signal.Signals, Any] = {}
    try:
        for s in SIGNALS:
            old[s] = signal.signal(s, handler)
    except ValueError:
        yield lambda: largest(0)
        return
    try:
        yield lambda: largest(seen[0] if seen else 0)
    finally:
        for s, before in old.items():
            signal.signal(s, before)
