"""Layers of a stack as arrays of their own, for programs whose layers are straight-line code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jpeft.leaf import Call, Leaf, Weight, register, static

if TYPE_CHECKING:
    from jpeft.uses import Uses

# They do the same to every layer.
_EACH = frozenset(("convert_element_type", "copy", "copy_p", "reduce_precision"))


def by_layer(arrays: Mapping[str, Any], uses: Uses) -> dict[str, Any]:
    """The same arrays, with `Layers` for each stack of matrices, or of more axes, that the model
    slices along its first axis.

    It is for a step compiled for a CPU, of a model whose layers are straight-line code (`unroll`,
    as many as there are). Such a program copies each layer's weights out of their stack before it
    multiplies by them, and keeps the copies for the backward pass; the gradients of a trained stack
    it lays out in one more. Apart, weights are multiplied, and trained, where they are. Vectors
    stay in their stack: they are cheap to copy, and an optimiser's step for each is a longer
    program. A loop over layers stacks them again at every step: leave it out there. `jpeft.merge`
    stacks them for good.

    With `remat`, compile with `xla_disable_hlo_passes` at `cse_barrier_expander`: else the compiler
    keeps of straight-line code what was to be made again.

    **Arguments:** `arrays`, by path: `Frozen.arrays`, or the trainable of `Train`; a leaf in it
    stays as it is. `uses`, from `jpeft.uses`.
    """

    def on(path: str, x: Any) -> Any:
        found = uses.get(path, ())
        if isinstance(x, Leaf) or not found or any(use.scanned != (0,) for use in found):
            return x
        if len(x.shape) <= 2:  # the stack of vectors
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            return Layers((one,) * x.shape[0], path)
        return Layers(tuple(jnp.unstack(x)), path)

    return {path: on(path, x) for path, x in arrays.items()}


@register
@dataclasses.dataclass(frozen=True)
class Layers(Weight):
    """A stack of arrays that is not made: `base`, a tuple of its layers, all of one shape."""

    base: Any
    path: str = static("")

    @property
    def proxy(self) -> jax.ShapeDtypeStruct:
        """The stack's shape."""
        first = self.base[0]
        return jax.ShapeDtypeStruct((len(self.base), *first.shape), first.dtype)

    @property
    def size(self) -> int:
        """The number of elements of the stack."""
        return len(self.base) * int(self.base[0].size)

    @property
    def leading(self) -> int:
        """The layers' axis is stacked."""
        return 1

    def materialise(self) -> Array:
        """The stack."""
        return jnp.stack(self.base)

    def astype(self, dtype: Any) -> Layers:
        """The same in another type."""
        return dataclasses.replace(self, base=tuple(x.astype(dtype) for x in self.base))

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each layer, when the stack has `spec`."""
        one = PartitionSpec(*spec[1:])
        return dataclasses.replace(self, base=(one,) * len(self.base))

    def layer(self, i: int) -> Any:
        """Layer `i`."""
        return self.base[i]

    def rule(self, call: Call, index: int) -> list[Any] | None:
        """What is done to every layer alike, and slices of the layers' axis, make no stack."""
        if call.name == "slice":
            return self._sliced(call)
        if call.name not in _EACH:
            return None
        return [dataclasses.replace(self, base=tuple(call.rebind(index, x)[0] for x in self.base))]

    def _sliced(self, call: Call) -> list[Any] | None:
        p = call.params
        if call.shape[1:] != self.shape[1:]:
            return None
        step = p["strides"][0] if p["strides"] else 1
        kept = self.base[p["start_indices"][0] : p["limit_indices"][0] : step]
        return [kept[0][None] if len(kept) == 1 else dataclasses.replace(self, base=kept)]
