"""The words of `--precision`, `--stage` and `--keep`, known before JAX is imported."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16", "mixed", "stochastic"]
Stage = Literal[0, 1, 2, 3]
Keep = Literal["nothing", "dots", "dots_without_batch"]
