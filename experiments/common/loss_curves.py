"""Training losses in windows, and the steps until one is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def fits(window: int, steps: int) -> None:
    """**Raises:** `ValueError` for a run of fewer steps than a window has."""
    if window > steps:
        raise ValueError(f"--window {window}: a run has {steps} steps; take fewer a point")


def windows(result: Mapping[str, Any], window: int) -> Float[np.ndarray, "seeds windows"]:
    """The mean loss of every `window` steps of a run, by seed.

    **Raises:** as `fits`.
    """
    each = np.asarray([s["losses"] for s in result["seeds"]])
    fits(window, each.shape[1])
    count = each.shape[1] // window
    return each[:, : count * window].reshape(len(each), count, window).mean(2)


def steps_to(curve: Sequence[float], loss: float, window: int) -> int:
    """Steps until a curve is at a loss; all of its steps and a window more where it never is."""
    reached = next((i for i, x in enumerate(curve) if x <= loss), len(curve))
    return (reached + 1) * window


def rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """To five decimals."""
    return [round(float(x), 5) for x in values]
