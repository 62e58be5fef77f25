"""Frozen weights in fewer bits: `--quantize`."""

from __future__ import annotations

from typing import Any

import jpeft
from experiments.common.methods import Method
from experiments.common.numbers import Quantised

# What is trained in a copy of its own, or moved by a subspace, cannot stand in fewer bits.
DENSE: tuple[Method, ...] = ("full", "top", "subspace", "said")


def refuse(quantize: Quantised | None, method: Method) -> None:
    """**Raises:** `ValueError` for a method that trains the weights themselves."""
    if quantize is not None and method in DENSE:
        raise ValueError(
            f"--quantize {quantize} keeps the model's weights as they are, and --method {method} "
            "trains them: choose a method that adds to them, such as lora"
        )


def in_format(params: Any, linear: str, quantize: Quantised | None, uses: Any) -> Any:
    """Parameters with the weights of linear layers in a format; None leaves them, and so does a
    model whose weights were quantised while they were read.

    **Arguments:** `linear`, the pattern of the weights.
    """
    if quantize is None or _quantised(params):
        return params
    if quantize == "bf16":
        import jax.numpy as jnp

        return jpeft.cast(params, jnp.bfloat16, keep=rf"^(?!.*({linear}))")
    return jpeft.Quantize(linear, quantize)(params, uses=uses)


def _quantised(params: Any) -> bool:
    import jax

    leaves = jax.tree.leaves(params, is_leaf=jpeft.is_leaf)
    return any(isinstance(x, jpeft.Quantized) for x in leaves)
