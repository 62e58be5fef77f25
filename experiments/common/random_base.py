"""A large model's parameters, drawn at random, in their frozen format from the start."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from experiments.common.numbers import Quantised
from jpeft.kernels import kernel_axes
from jpeft.paths import flatten, match, replace


def random_params(
    key: Any, dense: Any, linear: str, quantize: Quantised | None, uses: Any = None
) -> Any:
    """Parameters of the given shapes: kernels from N(0, 1/n) with n inputs, embeddings from
    N(0, 0.02), the rest ones.

    Weights of linear layers are drawn and quantised one layer at a time: no more than one layer's
    is ever dense.

    **Arguments:** `dense`, shapes; `linear`, the pattern of the linear layers' weights; `quantize`,
    their format, or None and bf16 for the model's own type.
    """
    leaves = flatten(dense)
    linears = set(match(linear, leaves))
    bits = None if quantize in (None, "bf16") else jpeft.Quantize(linear, quantize)
    made: dict[str, Any] = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        own = jax.random.fold_in(key, i)
        if path in linears:
            axes, _ = kernel_axes("Quantize", path, leaf, "", uses)
            stacked = len(axes) - len(axes.lstrip("b"))
            inputs = math.prod(n for n, a in zip(leaf.shape, axes, strict=True) if a == "i")
            about = path, leaf.shape[stacked:], leaf.dtype, inputs**-0.5, bits
            made[path] = _layers(own, leaf.shape[:stacked], *about)
        elif "embed" in path or (leaf.ndim > 1 and "norm" not in path):
            std = 0.02 if "embed" in path else leaf.shape[-2] ** -0.5
            made[path] = _drawn(own, leaf.shape, leaf.dtype, std)
        else:
            made[path] = jnp.ones(leaf.shape, leaf.dtype)
    return replace(dense, made)


def _layers(
    key: Any, stacked: tuple[int, ...], path: str, shape: Any, dtype: Any, std: float, bits: Any
) -> Any:
    def layer(key: Any) -> Any:
        weight = std * jax.random.normal(key, shape, dtype)
        return weight if bits is None else bits.leaf(path, weight)

    run: Any = layer
    for _ in stacked:
        run = _mapped(run)
    keys = jax.random.split(key, stacked) if stacked else key
    return jax.jit(run)(keys)


def _mapped(run: Any) -> Any:
    return lambda keys: jax.lax.map(run, keys)


def _drawn(key: Any, shape: Any, dtype: Any, std: float) -> Any:
    return jax.jit(lambda k: std * jax.random.normal(k, shape, dtype))(key)
