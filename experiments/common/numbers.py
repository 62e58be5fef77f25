"""The words of `--precision`, `--stage`, `--keep`, `--quantize`, known before JAX."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16", "mixed", "stochastic"]
Stage = Literal[0, 1, 2, 3]
Keep = Literal["nothing", "dots", "dots_without_batch"]
Quantised = Literal["bf16", "int8", "fp4", "nf4"]
Optimiser = Literal["adamw", "adamw8bit"]
Attention = Literal["xla", "cudnn"]
