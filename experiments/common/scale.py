"""How a run is laid over devices, and in which numbers: `--mesh`, `--stage`, `--precision`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import jpeft
from experiments.common.numbers import Keep, Precision, Stage
from jpeft.models import bert, gpt2, llama, t5
from jpeft.precision import master_weights, stochastic_rounding
from sharding import Axes, Zero, axes_by_pattern, make_mesh
from sharding.offload import offloaded

TABLES: dict[type, tuple[tuple[str, tuple[str, ...]], ...]] = {
    bert.BertForSequenceClassification: bert.AXES,
    gpt2.Gpt2: gpt2.AXES,
    llama.Llama: llama.AXES,
    t5.T5: t5.AXES,
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Devices and numbers of a run.

    **Attributes:** `mesh`, a shape as `make_mesh`'s, `all` for all devices on `fsdp`, or None for
    one device (all of them in a job of several processes); `stage`, ZeRO's; `precision`: `float32`;
    `bfloat16`, the model computes in it and trained arrays are fp32; `mixed`, trained arrays are
    bf16 too, with fp32 masters in the optimiser's state; `stochastic`, bf16 without masters,
    rounded at random; `accumulate`, take a batch in so many parts; `offload`, keep the
    optimiser's state in the host's memory.
    """

    mesh: str | None = None
    stage: Stage = 3
    precision: Precision = "float32"
    accumulate: int = 1
    offload: bool = False

    def zero(self) -> Zero | None:
        """Where arrays stand; None for one device. **Raises:** `ValueError` for a wrong mesh."""
        if self.mesh is None and jax.process_count() == 1:
            return None
        return Zero(make_mesh(None if self.mesh in (None, "all") else self.mesh), self.stage)

    @property
    def kept(self) -> Any:
        """What trained arrays are kept in; None for what they are made in, fp32."""
        return None if self.precision in ("float32", "bfloat16") else jnp.bfloat16

    def narrowed(self, params: Any) -> Any:
        """Parameters in what the model computes in, as frozen ones are; quantised ones stay."""
        dtype = compute_dtype(self.precision)

        def of(x: Any) -> Any:
            if jpeft.is_leaf(x) or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
                return x
            shape = isinstance(x, jax.ShapeDtypeStruct)
            return jax.ShapeDtypeStruct(x.shape, dtype) if shape else x.astype(dtype)

        return jax.tree.map(of, params, is_leaf=jpeft.is_leaf)

    def optimiser(self, inner: optax.GradientTransformation, seed: int) -> Any:
        """The optimiser with what the precision adds to it."""
        if self.precision == "mixed":
            inner = master_weights(inner)
        if self.precision == "stochastic":
            inner = stochastic_rounding(inner, seed)
        return offloaded(inner) if self.offload else inner


def scale_of(config: Any) -> Scale:
    """The scale of a command's configuration."""
    numbers = (config.precision, config.accumulate, config.offload)
    return Scale(config.mesh, config.stage, *numbers)


def check_batch(config: Any) -> None:
    """**Raises:** `ValueError` for rows that devices, or a batch's parts, cannot share evenly."""
    if config.batch % config.accumulate:
        raise ValueError(
            f"--accumulate {config.accumulate}: a batch of {config.batch} rows has no such parts, "
            "all equal"
        )
    zero = scale_of(config).zero()
    if zero is not None:
        part = jax.ShapeDtypeStruct((config.batch // config.accumulate,), jnp.int32)
        zero.batch({"labels": part})


def remat_of(remat: bool, keep: Keep) -> Any:
    """What models take as `remat`. **Raises:** `ValueError` for --keep without --remat."""
    if not remat and keep != "nothing":
        raise ValueError(f"--keep {keep} says what --remat keeps: pass --remat too")
    policies = jax.checkpoint_policies
    kept = {
        "dots": policies.dots_saveable,
        "dots_without_batch": policies.dots_with_no_batch_dims_saveable,
    }
    return kept.get(keep, remat)


def compute_dtype(precision: Precision) -> Any:
    """What a model computes in."""
    return jnp.dtype("float32" if precision == "float32" else "bfloat16")


def axes_of(model: Any) -> Axes | None:
    """The names of the axes of a model's parameters; None for a model that has no table."""
    table = TABLES.get(type(model))
    return None if table is None else axes_by_pattern(table)


def all_axes(transform: jpeft.Transform, params: Any, trainable: Any, axes: Axes) -> Axes:
    """The names of the axes of parameters, also quantised ones, and of what is trained, by path."""
    own = {
        **jpeft.leaf_axes(params, axes),
        **jpeft.trainable_axes(transform, params, trainable, axes),
    }
    return lambda path, shape: own[path] if path in own else axes(path, shape)


def on_host(tree: Any) -> Any:
    """Whole arrays, each process's own, on no mesh; every process of a job must ask."""

    def whole(x: Any) -> Any:
        if x.is_fully_addressable or x.is_fully_replicated:
            return jnp.asarray(np.asarray(x))
        return jnp.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
