"""The leaf of a quantised weight: codes and scales, made dense where a product reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jpeft import nibbles
from jpeft._axes import regroup
from jpeft.leaf import Call, Leaf, LeafError, Weight, register, static
from jpeft.llm_int8 import mixed_product
from jpeft.rescale import Scaled
from jpeft.scales import Scales, specs_of


@register
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """A weight in 4 or 8 bits, which nothing trains.

    Codes and scales have the weight's own axes, in its order: `blocked` (counted from the end) is
    the one along which `block` numbers share a scale. So layers are sliced, and devices share the
    weight, along any axis whose parts are whole blocks.

    A product makes the dense weight, of the type that the model sees, and drops it; the backward
    pass makes it again.

    **Attributes:** `codes`: of 4 bits, uint8, with half as many bytes along `blocked` (rounded up
    to whole blocks); of 8 bits, int8, of the weight's shape. `scales`: fp32, one for each block
    along `blocked`, or `Scales`; None where codes are read as they are. `length`, the weight's
    length along `blocked`; `inner`, how many axes one weight has, after those that are stacked;
    `outliers`, of 8 bits, above 0 for products in integers (`llm_int8.mixed_product`).

    Source: Dettmers et al. 2023 (4 bits); Dettmers et al. 2022, LLM.int8() (8 bits).
    """

    codes: Any
    scales: Any
    format: str = static("nf4")
    block: int = static(64)
    length: int = static(0)
    blocked: int = static(-2)
    inner: int = static(2)
    outliers: int = static(0)
    seen: Any = static(jnp.dtype("float32"))
    path: str = static("")

    @property
    def base(self) -> Any:  # type: ignore[override]
        """The codes: there is no other leaf below."""
        return self.codes

    @property
    def proxy(self) -> jax.ShapeDtypeStruct:
        """The shape and type that the model sees."""
        shape = list(self.codes.shape)
        shape[self.blocked] = self.length
        return jax.ShapeDtypeStruct(tuple(shape), self.seen)

    @property
    def leading(self) -> int:
        """How many first axes are stacked."""
        return self.ndim - self.inner

    def materialise(self) -> Array:
        """The dense array, computed in fp32, in the type that the model sees."""
        axis = self.ndim + self.blocked
        scales = self.scales.full() if isinstance(self.scales, Scales) else self.scales
        if self.format == "int8":
            return (self.codes if scales is None else self.codes * scales).astype(self.seen)
        before, after = self.codes.shape[:axis], self.codes.shape[axis + 1 :]
        packed = self.codes.reshape(*before, -1, self.block // 2, *after)
        wide = nibbles.values(nibbles.unpack(packed, axis + 1), self.format)
        wide = (wide * jnp.expand_dims(scales, axis + 1)).reshape(*before, -1, *after)
        return jax.lax.slice_in_dim(wide, 0, self.length, axis=axis).astype(self.seen)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the weight has `spec`."""
        parts = [*spec, *[None] * (self.ndim - len(spec))]
        narrow = list(parts)
        if self.scales is not None and self.format == "int8":
            narrow[self.blocked] = None
        scales = None if self.scales is None else specs_of(self.scales, narrow, self.leading)
        return dataclasses.replace(self, codes=PartitionSpec(*parts), scales=scales)

    def divided(self, parts: Sequence[int]) -> Quantized:
        """This leaf, for devices that each have whole blocks."""
        split = parts[self.blocked]
        if split > 1 and self.format != "int8" and self.length % (split * self.block):
            raise LeafError(
                f"'{self.path}' is quantised in blocks of {self.block}, and a shard_map splits "
                f"its axis of {self.length} into {split} parts, which are no whole blocks: choose "
                "another block= in Quantize, or split another axis"
            )
        # Scales in 8 bits have groups across the whole weight, which has to be on one device.
        whole = all(n == 1 for n in parts[self.leading :])
        leaf = self if whole else self._plain()
        return dataclasses.replace(leaf, length=self.length // split)

    def rule(self, call: Call, index: int) -> list[Any] | None:
        """As any weight's; what keeps every element in its place changes the type alone."""
        if call.name == "convert_element_type":
            to = call.params["new_dtype"]
            real = jnp.issubdtype(to, jnp.floating)
            return [dataclasses.replace(self, seen=jnp.dtype(to))] if real else None
        if call.name in ("copy", "copy_p", "sharding_constraint"):
            return [self]
        method = getattr(self, f"rule_{call.name}", None)
        return None if method is None else method(call, index)

    # -- products ----------------------------------------------------------------------------

    def rule_dot_general(self, call: Call, index: int) -> list[Any] | None:
        """The product with the dense weight; in 8 bits with the codes, and the scales after it."""
        if isinstance(call.operands[1 - index], Leaf):
            return None
        if self.format == "int8" and self.scales is not None:
            if self.outliers and self._only(call, index):
                return [self._in_integers(call, index)]
            bare = dataclasses.replace(self, scales=None)
            scaled = Scaled(bare, self.scales, self.path).rule_dot_general(call, index)
            if scaled is not None:
                return scaled
        return self._product(call, index)

    def rule_conv_general_dilated(self, call: Call, index: int) -> list[Any] | None:
        """The convolution with the dense kernel."""
        return self._product(call, index) if index == 1 else None

    def _only(self, call: Call, index: int) -> bool:
        """Whether a product is along the blocked axis, and no other axis is shared."""
        contract, batch = call.params["dimension_numbers"]
        return tuple(contract[index]) == (self.ndim + self.blocked,) and not batch[index]

    def _in_integers(self, call: Call, index: int) -> Array:
        contract, _ = call.params["dimension_numbers"]
        x = jnp.moveaxis(call.operands[1 - index], contract[1 - index][0], -1)
        codes, scales = (jnp.moveaxis(a, self.blocked, 0) for a in (self.codes, self.scales))
        y = mixed_product(x, codes, scales, self.outliers)
        if index == 0:  # the weight's outputs come first
            y = jnp.moveaxis(y, range(x.ndim - 1), range(self.ndim - 1, y.ndim))
        return y.astype(call.eqn.outvars[0].aval.dtype)  # type: ignore[attr-defined]

    def _product(self, call: Call, index: int) -> list[Any]:
        """An equation linear in its other operand. Its backward pass makes the dense weight again:
        only the codes are kept for it.
        """

        def product(weight: Quantized, x: Any) -> list[Any]:
            operands = [x, x]
            operands[index] = weight.materialise()
            return call.dispatch(dataclasses.replace(call, operands=tuple(operands)))

        return jax.checkpoint(product)(self, call.operands[1 - index])

    # -- the same weight, arranged otherwise ---------------------------------------------------

    def _plain(self) -> Quantized:
        """With scales in fp32, which have the weight's axes."""
        if not isinstance(self.scales, Scales):
            return self
        return dataclasses.replace(self, scales=self.scales.full())

    def _each(self, change: Callable[[Array, int], Array], **static: Any) -> Quantized:
        """`change(array, its length along blocked)` on codes and plain scales."""
        codes, scales = (
            None if x is None else change(x, x.shape[self.blocked])
            for x in (self.codes, self.scales)
        )
        return dataclasses.replace(self, codes=codes, scales=scales, **static)

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """The transposed weight has transposed codes and scales."""
        del index
        order = call.params["permutation"]
        axis = list(order).index(self.ndim + self.blocked)
        stacked = list(order[: self.leading]) == list(range(self.leading))
        changes = {
            "blocked": axis - self.ndim,
            "inner": self.inner if stacked else self.ndim,
        }
        return [self._plain()._each(lambda x, _: x.transpose(order), **changes)]

    def _reshaped(self, call: Call, index: int) -> list[Any] | None:
        """Axes other than the blocked one are split and joined freely."""
        del index
        new = call.shape
        if self.shape[self.leading :] == new[len(new) - self.inner :]:
            return [
                self._stacked(lambda x: x.reshape(*new[: -self.inner], *x.shape[self.leading :]))
            ]
        axis = self.ndim + self.blocked
        place = None
        for before, after in regroup(self.shape, new):
            if axis not in before:
                continue
            if any(self.shape[i] != 1 for i in before if i != axis):
                return None
            wide = [j for j in after if new[j] != 1] or list(after)
            if len(wide) != 1:
                return None
            (place,) = wide
        if place is None:
            return None

        def arranged(x: Array, n: int) -> Array:
            return x.reshape(*new[:place], n, *new[place + 1 :])

        changes = {"blocked": place - len(new), "inner": len(new)}
        return [self._plain()._each(arranged, **changes)]

    rule_reshape = _reshaped
    rule_squeeze = _reshaped
    rule_expand_dims = _reshaped

    def rule_broadcast_in_dim(self, call: Call, index: int) -> list[Any] | None:
        """Only new axes of size 1, in order: a reshape."""
        kept, new = call.params["broadcast_dimensions"], call.params["shape"]
        same = [new[j] for j in kept] == list(self.shape) and list(kept) == sorted(kept)
        ones = all(n == 1 for j, n in enumerate(new) if j not in kept)
        return self._reshaped(call, index) if same and ones else None

    def _stacked(self, change: Callable[[Array], Array]) -> Quantized:
        """`change` on every array, of their stacked axes alone."""
        return jax.tree.map(change, self)

    def _cut(self, sizes: Sequence[int], cut: Callable[[Array, int], Array]) -> list[Any] | None:
        """`cut(array, axis)` along the axes where the result has other sizes."""
        axes = [i for i, n in enumerate(sizes) if n != self.shape[i]]
        if self.ndim + self.blocked in axes:
            return None

        def on(x: Array, _: int = 0) -> Array:
            for axis in axes:
                x = cut(x, axis)
            return x

        if all(i < self.leading for i in axes):
            return [self._stacked(on)]
        return [self._plain()._each(on)]

    def rule_slice(self, call: Call, index: int) -> list[Any] | None:
        """A slice along any axis but the blocked one."""
        del index
        starts, limits = call.params["start_indices"], call.params["limit_indices"]
        strides = call.params["strides"] or (1,) * self.ndim
        return self._cut(
            call.shape,
            lambda x, i: jax.lax.slice_in_dim(x, starts[i], limits[i], strides[i], i),
        )

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """As `slice`, at positions known at run time."""
        if index != 0:
            return None
        starts, sizes = call.operands[1:], call.params["slice_sizes"]
        return self._cut(
            sizes, lambda x, i: jax.lax.dynamic_slice_in_dim(x, starts[i], sizes[i], i)
        )
