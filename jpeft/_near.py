"""The nearest known name, for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or where nothing is near the empty string."""
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return f": did you mean '{near[0]}'?" if near else ""
