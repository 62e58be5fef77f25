"""A weight whose inputs or outputs are rescaled: the leaf of DoRA's magnitudes and of IA3."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jpeft._axes import regroup
from jpeft.leaf import Call, Leaf, Weight, dense, register, static, wide


@register
@dataclasses.dataclass(frozen=True)
class Scaled(Weight):
    """`base * gain`, where `gain` has the base's axes, of size 1 where it is constant.

    In a product the gain multiplies the activations: those that go in, where it varies along the
    contracted axes, or those that come out. The scaled weight is never formed.

    **Attributes:** `base`, the weight, an array or another weight leaf; `gain`, an fp32 array;
    `leading`, how many of the first axes were stacked when the leaf was made.
    """

    base: Any
    gain: Any
    path: str = static("")
    leading: int = static(0)  # type: ignore[assignment]

    def materialise(self) -> Array:
        """The dense array, multiplied in fp32 (in fp64 with such a base), in the base's type."""
        return (dense(self.base).astype(wide(self.dtype)) * self.gain).astype(self.dtype)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        on_gain = [s if n != 1 else None for s, n in zip(spec, self.gain.shape, strict=False)]
        return dataclasses.replace(self, base=inner, gain=PartitionSpec(*on_gain))

    def switched(self, on: Array) -> Scaled:
        """This leaf, with a gain of one where `on` is false."""
        return dataclasses.replace(self, gain=jnp.where(on, self.gain, 1))

    def rule_dot_general(self, call: Call, index: int) -> list[Any] | None:
        """`x (W g)` is `(x W) g` or `(x g) W`."""
        contract, batch = call.params["dimension_numbers"]
        x = call.operands[1 - index]
        if isinstance(x, Leaf):
            return None
        varies = {i for i, n in enumerate(self.gain.shape) if n != 1}
        mine, my_batch = contract[index], batch[index]
        free = [i for i in range(self.ndim) if i not in mine and i not in my_batch]
        if varies <= {*free, *my_batch}:
            (y,) = call.rebind(index, self.base)
            n = len(my_batch)
            first = n if index == 0 else y.ndim - len(free)
            places = [*range(n), *range(first, first + len(free))]
            return [y * self._on([*my_batch, *free], places, y)]
        if varies <= {*mine, *my_batch}:
            places = [*batch[1 - index], *contract[1 - index]]
            operands = [self.base, self.base]
            operands[1 - index] = x * self._on([*my_batch, *mine], places, x)
            return call.dispatch(dataclasses.replace(call, operands=tuple(operands)))
        return None

    def _on(self, axes: Sequence[int], places: Sequence[int], like: Array) -> Array:
        """The gain's `axes` at the axes `places` of an array like `like`."""
        at = dict(zip(places, axes, strict=True))
        rest = [i for i in range(self.ndim) if i not in axes]
        gain = jnp.squeeze(self.gain, rest)
        left = [i for i in range(self.ndim) if i in axes]
        gain = gain.transpose([left.index(at[p]) for p in sorted(at)])
        gain = jnp.expand_dims(gain, [p for p in range(like.ndim) if p not in at])
        return gain.astype(like.dtype)

    def rule_gather(self, call: Call, index: int) -> list[Any] | None:
        """A look-up of whole rows: the row times the gain along the width."""
        d, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
        rows = tuple(d.collapsed_slice_dims)
        if index != 0 or self.ndim != 2 or len(rows) != 1 or self.gain.shape[rows[0]] != 1:
            return None
        width = 1 - rows[0]
        if sizes[width] != self.shape[width]:
            return None
        (y,) = call.rebind(0, self.base)
        return [y * self._on([width], list(d.offset_dims), y)]

    def rule_conv_general_dilated(self, call: Call, index: int) -> list[Any] | None:
        """A gain of the output channels multiplies what comes out."""
        d = call.params["dimension_numbers"]
        out = d.rhs_spec[0]
        if index != 1 or any(n != 1 for i, n in enumerate(self.gain.shape) if i != out):
            return None
        (y,) = call.rebind(1, self.base)
        return [y * self._on([out], [d.out_spec[1]], y)]

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """The transposed weight has the transposed gain."""
        (base,) = call.rebind(index, self.base)
        gain = self.gain.transpose(call.params["permutation"])
        return [dataclasses.replace(self, base=base, gain=gain)]

    def _reshaped(self, call: Call, index: int) -> list[Any]:
        """A reshape needs the gain along every axis; it is small beside the weight's product."""
        (base,) = call.rebind(index, self.base)
        new = call.shape
        groups = regroup(self.shape, new)
        shape: list[int] = []
        gain = self.gain
        for before, after in groups:
            varies = any(self.gain.shape[i] != 1 for i in before)
            if varies:
                for i in before:
                    gain = jnp.repeat(gain, self.shape[i], i) if gain.shape[i] == 1 else gain
            shape += [new[j] if varies else 1 for j in after]
        return [dataclasses.replace(self, base=base, gain=gain.reshape(shape))]

    rule_reshape = _reshaped
    rule_squeeze = _reshaped

    def rule_slice(self, call: Call, index: int) -> list[Any]:
        """A slice of the weight has the slice of the gain."""
        (base,) = call.rebind(index, self.base)
        starts, limits = call.params["start_indices"], call.params["limit_indices"]
        strides = call.params["strides"] or (1,) * self.ndim
        gain = self.gain
        for i, n in enumerate(gain.shape):
            if n != 1:
                gain = jax.lax.slice_in_dim(gain, starts[i], limits[i], strides[i], i)
        return [dataclasses.replace(self, base=base, gain=gain)]

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """As `slice`, at positions known at run time."""
        if index != 0:
            return None
        (base,) = call.rebind(0, self.base)
        gain = self.gain
        for i, (n, size) in enumerate(zip(gain.shape, call.params["slice_sizes"], strict=True)):
            if n != 1:
                gain = jax.lax.dynamic_slice_in_dim(gain, call.operands[1 + i], size, i)
        return [dataclasses.replace(self, base=base, gain=gain)]
