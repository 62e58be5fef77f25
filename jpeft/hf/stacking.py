"""Quantised parameters put together on their devices, one layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jpeft.paths import TargetError, by_pattern
from jpeft.quantize import Quantize
from jpeft.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Form:
    """What a quantised parameter will be.

    **Attributes:** `layer`, one layer of it, as shapes; `count`, how many layers are stacked, None
    where none are; `where`, the sharding of each of its arrays, or None.
    """

    layer: Quantized
    count: int | None
    where: Any = None

    @property
    def whole(self) -> Quantized:
        """The parameter as shapes."""
        if self.count is None:
            return self.layer
        return _with_first(self.layer, self.count)

    def build(self, make: Callable[[int], Quantized]) -> Quantized:
        """The parameter, of `make(layer)`: each layer is made, put in its place, and let go of."""
        if self.count is None:
            return moved(make(0), self.where)
        each = None if self.where is None else jax.tree.map(without_first, self.where)
        return filled(lambda i: moved(make(i), each), self.count, self.where)


def form(
    quantize: Quantize,
    path: str,
    leaf: Any,
    stacked: bool,
    where: Sharding | None = None,
    by_layer: bool = True,
) -> Form:
    """What the parameter at a path becomes.

    **Arguments:** `leaf`, its shape and type; `stacked`, whether its first axis counts layers;
    `where`, the dense parameter's sharding; `by_layer`, whether it comes one layer at a time.

    **Raises:** `TargetError` for a parameter that is no kernel; `ValueError` for a sharding whose
    parts are no whole blocks, or that splits layers that come one at a time.
    """
    letters = by_pattern(quantize.axes, path, "")
    if letters not in ("", "bio" if stacked else "io"):
        raise TargetError(
            f"'{path}' is {'(layers, in, out)' if stacked else '(in, out)'} in this model, and "
            f"axes='{letters}' says otherwise: leave axes out"
        )
    one = jax.ShapeDtypeStruct(leaf.shape[1:] if stacked else leaf.shape, leaf.dtype)
    plain = dataclasses.replace(quantize, axes={})
    made = Form(
        jax.eval_shape(lambda w: plain.leaf(path, w), one), leaf.shape[0] if stacked else None
    )
    if where is None:
        return made
    return dataclasses.replace(made, where=_shardings(made, path, where, by_layer))


def filled(make: Callable[[int], Any], count: int, where: Any = None) -> Any:
    """A tree of arrays with a new first axis, whose parts are the trees `make(0)`, `make(1)`, ...

    **Arguments:** `where`, the sharding of each stacked array; what `make` gives has the same
    without its first axis.
    """
    first = make(0)
    shapes = _with_first(first, count)
    empty = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=where
    )()
    put = jax.jit(_put, donate_argnums=0, out_shardings=where)
    # Waited for, or the next tensor is read while the host still holds this one.
    out = jax.block_until_ready(put(empty, first, 0))
    del first, empty
    for i in range(1, count):
        out = jax.block_until_ready(put(out, make(i), i))
    return out


def moved(tree: Any, where: Any) -> Any:
    """Arrays on the devices that hold them; None leaves them where they are."""
    if where is None:
        return tree
    if not all(s.is_fully_addressable for s in jax.tree.leaves(where)):
        tree = jax.tree.map(np.asarray, tree)  # other processes' devices take host arrays only
    return jax.device_put(tree, where)


def without_first(where: Any) -> Any:
    """The sharding of one layer, of a stacked array's whose layers are not split."""
    if not isinstance(where, NamedSharding):
        return where
    spec = PartitionSpec(*where.spec[1:])
    return NamedSharding(where.mesh, spec, memory_kind=where.memory_kind)


def splits_layers(where: Sharding | None) -> bool:
    """Whether a stacked array's layers lie on different devices, or may do so."""
    if where is None or len(where.device_set) == 1:
        return False
    return not isinstance(where, NamedSharding) or bool(where.spec and where.spec[0] is not None)


def _shardings(made: Form, path: str, where: Sharding, by_layer: bool) -> Any:
    if len(where.device_set) == 1:
        return jax.tree.map(lambda _: where, made.whole)
    if not isinstance(where, NamedSharding):
        raise ValueError(
            f"'{path}' is quantised and has a {type(where).__name__}: which of its axes are split? "
            "Give it a NamedSharding"
        )
    if by_layer and made.count is not None and splits_layers(where):
        raise ValueError(
            f"'{path}' has the sharding {where.spec}, which puts its layers on different devices: "
            "a weight that is quantised is read one layer at a time, so shard another axis"
        )
    whole = made.whole

    def on(array: Any, spec: PartitionSpec) -> NamedSharding:
        out = NamedSharding(where.mesh, spec, memory_kind=where.memory_kind)
        try:
            out.shard_shape(tuple(array.shape))
        except ValueError as e:
            raise ValueError(
                f"'{path}', of shape {whole.shape} in blocks of {whole.block} inputs, cannot have "
                f"the sharding {where.spec}: its parts are no whole blocks ({e})"
            ) from e
        return out

    return jax.tree.map(on, whole, whole.specs(where.spec))


def _with_first(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)


def _put(stacked: Any, layer: Any, i: Any) -> Any:
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), stacked, layer
    )
