"""A signal to stop, taken between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from sharding.cluster import any_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Generator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM, which announces a preemption, let the running step end.

    What it gives says whether a signal came, to this process or to another one of the job: every
    process has to ask after each step, and they hear the same. A second signal stops at once, by
    `KeyboardInterrupt`. Outside of the main thread signals are not ours, and it always says no.
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
        yield lambda: any_process(False)
        return
    try:
        yield lambda: any_process(bool(seen))
    finally:
        for s, before in old.items():
            signal.signal(s, before)
