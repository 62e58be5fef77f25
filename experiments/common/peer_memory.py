"""What a step holds at its peak, read from the operating system or from the device's allocator."""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import re
from collections.abc import Callable

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident_mib(field: str = "VmRSS") -> float:
    """MiB of memory that this process has now; `VmHWM`, the most it had since the last reset.

    0 where the system does not tell.
    """
    if not STATUS.is_file():
        return 0.0
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def reset_peak() -> bool:
    """Start counting the peak again; false where the system does not allow it."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Give memory that nobody uses back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def host_peak_mib(step: Callable[[], object], base: float) -> float | None:
    """MiB above `base` of the larger of two steps, after two that warm up. Each side's base is what
    its process had with its libraries imported and used once, before it read the model. Memory that
    loading and compiling left free in the C library's hands is given back before.

    None where the peak cannot be reset: the peak of loading would be taken for the step's.
    """
    for _ in range(2):
        step()
    give_back()
    if not reset_peak():
        return None
    for _ in range(2):
        step()
    return resident_mib("VmHWM") - base
