"""Waiting for the other processes of a job, and telling for whom."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

logger = logging.getLogger("sharding")
TELL, PAUSE, ANSWER = 10.0, 0.2, 5.0  # seconds


@contextmanager
def told(coordinator: str, processes: int, process: int, timeout: float) -> Generator[None]:
    """Tell once what is waited for, where it takes longer than `TELL` seconds."""
    text = "process %d of %d: waiting for the others at %s, for %.0f s at most"
    timer = threading.Timer(TELL, logger.warning, (text, process, processes, coordinator, timeout))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_first(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Wait until the first process listens. JAX would end this one, and name nothing.

    **Raises:** `TimeoutError` after `timeout` seconds.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
            return
        except OSError as e:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"process {process} of {processes}: nobody listens at {coordinator} after "
                    f"{timeout:.0f} s ({e}): process 0 must run there, and each process have a "
                    "number of its own"
                ) from e
        time.sleep(PAUSE)
