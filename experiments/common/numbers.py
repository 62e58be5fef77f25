"""The words of `--precision` and `--stage`, which a command knows before it imports JAX."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16", "mixed", "stochastic"]
Stage = Literal[0, 1, 2, 3]
