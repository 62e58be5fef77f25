"""The largest batch that fits, in few compilations."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tried:
    """Bytes on a device that a batch takes, and those that there are."""

    total: float
    limit: float
    fits: bool

    def __str__(self) -> str:
        verdict = "fits" if self.fits else "too much"
        return f"{self.total / 2**30:,.2f} of {self.limit / 2**30:,.2f} GiB, {verdict}"


def largest(attempt: Callable[[int], Tried | None], unit: int, most: int = 12) -> int:
    """The largest batch that fits, of a round number of `unit` rows: any up to 15 times as many,
    even ones up to 30, then multiples of 4 up to 60, and so on.

    Memory grows about linearly with the batch: each try is where the line through two of the last
    ones meets what there is, between the largest that fits and the smallest that does not.

    **Arguments:** `attempt`, given rows, what they take; None where that cannot be found out, which
    counts as too much. `most`, attempts; the largest that was found to fit by then is returned.

    **Raises:** `ValueError` where not even `unit` rows fit.
    """
    first = attempt(unit)
    if first is None or not first.fits:
        took = "cannot be compiled" if first is None else f"take {first}"
        raise ValueError(
            f"{unit} rows, the fewest that these devices can share, {took}: try more devices, a "
            "higher --stage, or tensor=... in --mesh"
        )
    tried: dict[int, Tried | None] = {1: first}
    low, high = 1, None
    while len(tried) < most:
        between = _round(_guess(tried, low, high))
        if between <= low:
            between = _above(low)
        if high is not None and between >= high:
            between = _round(high - 1)
            if between <= low:
                break
        tried[between] = attempt(between * unit)
        found = tried[between]
        if found is not None and found.fits:
            low = between
        else:
            high = between
    return low * unit


def _guess(tried: dict[int, Tried | None], low: int, high: int | None) -> int:
    """Where a line through what is known meets the limit; never far beyond what is known."""
    known = {n: t for n, t in tried.items() if t is not None}
    if high is not None and high not in known:
        return (low + high) // 2
    below = sorted(n for n in known if n <= low)
    pair = (low, high) if high is not None else tuple(below[-2:])
    if len(pair) < 2:
        return 2 * low
    first, second = pair
    assert first is not None
    assert second is not None
    slope = (known[second].total - known[first].total) / (second - first)
    met = low + int((known[low].limit - known[low].total) / slope) if slope > 0 else 2 * low
    return min(met, 8 * low) if high is None else met


def _step(n: int) -> int:
    """How far apart the numbers of units around `n` are."""
    return max(1, 2 ** (n.bit_length() - 4))


def _round(n: int) -> int:
    return n - n % _step(n)


def _above(n: int) -> int:
    return n + _step(n)


def apart(function: Callable[[Any], Any], argument: Any) -> Any:
    """What a function gives in a process of its own; None where that process is no more.

    The TPU compiler may crash on one size and not on the next, and takes its process with it.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_silent) as pool:
        try:
            return pool.submit(function, argument).result()
        except BrokenProcessPool:
            return None


def _silent() -> None:
    """The traces of a crash are of no use to those who did not write the compiler."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
