"""The leaf of LoRA: a weight with a low-rank update, multiplied without ever forming the sum."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jpeft._axes import reshaped_kinds
from jpeft._lookup import lookup
from jpeft.leaf import Call, Leaf, Weight, dense, register, static, wide


@register
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """`base + scale * A B`.

    `axes` has one letter for each axis of the base, aligned at the end (a scan that slices the
    leaf removes leading ones): `b` batch (a layer, an expert), `i` input, `o` output.

    **Attributes:** `base`, the weight, an array or another weight leaf; `a`, of shape
    `(*batch, *inputs, rank)`; `b`, of shape `(*batch, rank, *outputs)`; `key`, None or one PRNG
    key for each element of the batch axes: with it, `dropout` acts on the input of the low-rank
    branch of a product (not on a look-up, and not where the dense array is formed).

    Source: Hu et al. 2021, equation 3.
    """

    base: Any
    a: Any
    b: Any
    key: Any = None
    scale: float = static(1.0)
    dropout: float = static(0.0)
    axes: str = static("io")
    path: str = static("")

    @property
    def kinds(self) -> str:
        """One letter for each present axis of the base."""
        extra = self.ndim - len(self.axes)
        return "b" * extra + self.axes[max(-extra, 0) :]

    @property
    def leading(self) -> int:
        """The first axes that are stacked."""
        return len(self.kinds) - len(self.kinds.lstrip("b"))

    def switched(self, on: Array) -> LowRank:
        """This leaf, without its update where `on` is false."""
        return dataclasses.replace(self, b=jnp.where(on, self.b, 0))

    def _of(self, letters: str) -> list[int]:
        return [i for i, k in enumerate(self.kinds) if k in letters]

    def _order(self, factor: str) -> list[int | None]:
        """The base's axis behind each axis of a factor; None is the rank."""
        if factor == "a":
            return [*self._of("b"), *self._of("i"), None]
        return [*self._of("b"), None, *self._of("o")]

    def delta(self) -> Float[Array, ...]:
        """`scale * A B`, of the base's shape, in the factors' precision."""
        letters = string.ascii_lowercase[: self.ndim]
        a, b = ("".join("z" if i is None else letters[i] for i in self._order(f)) for f in "ab")
        return self.scale * jnp.einsum(f"{a},{b}->{letters}", self.a, self.b)

    def materialise(self) -> Array:
        """The dense array, summed in fp32 (in fp64 with such a base), in the base's type."""
        return (dense(self.base).astype(wide(self.dtype)) + self.delta()).astype(self.dtype)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        of = dict(enumerate(spec))

        def on(factor: str) -> PartitionSpec:
            return PartitionSpec(*[None if i is None else of.get(i) for i in self._order(factor)])

        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        key = None if self.key is None else PartitionSpec(*[of.get(i) for i in self._of("b")])
        return dataclasses.replace(self, base=inner, a=on("a"), b=on("b"), key=key)

    # -- products ----------------------------------------------------------------------------

    def rule_dot_general(self, call: Call, index: int) -> list[Any] | None:
        """`x W` is `x base + ((x A) * scale) B`; `x W^T` goes through B first."""
        contract, batch = call.params["dimension_numbers"]
        x, mine, theirs = call.operands[1 - index], contract[index], contract[1 - index]
        my_batch, x_batch = batch[index], batch[1 - index]
        if isinstance(x, Leaf) or set(my_batch) != set(self._of("b")):
            return None
        if set(mine) == set(self._of("i")):
            first, second = "a", "b"
        elif set(mine) == set(self._of("o")):
            first, second = "b", "a"
        else:
            return None
        (y,) = call.rebind(index, self.base)
        place = self._order(first).index
        low = jax.lax.dot_general(
            self._dropped(x),
            getattr(self, first).astype(x.dtype),
            ((theirs, [place(i) for i in mine]), (x_batch, [place(i) for i in my_batch])),
            precision=call.params["precision"],
        )
        # The batch axes of `low` come first, in the order in which the call lists them.
        place = self._order(second).index
        left, right = low * jnp.asarray(self.scale, low.dtype), getattr(self, second)
        meet = ((low.ndim - 1,), (place(None),))
        beside = (tuple(range(len(my_batch))), tuple(place(i) for i in my_batch))
        right = right.astype(low.dtype)
        if index == 0:
            left, right = right, left
            meet, beside = (meet[1], meet[0]), (beside[1], beside[0])
        update = jax.lax.dot_general(
            left,
            right,
            (meet, beside),
            precision=call.params["precision"],
            preferred_element_type=y.dtype,
        )
        return [y + update]

    def _dropped(self, x: Array) -> Array:
        if self.key is None or not self.dropout:
            return x
        key = self.key if self.key.ndim == 0 else self.key.reshape(-1)[0]
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))

    def rule_gather(self, call: Call, index: int) -> list[Any] | None:
        """A look-up in a table `(rows, width)`: the row of the base plus `(row of A) B`."""
        rows = self._of("i")
        found = lookup(call, index, rows[0]) if self.ndim == 2 and len(rows) == 1 else None
        if found is None:
            return None
        (y,) = call.rebind(0, self.base)
        d, p = call.params["dimension_numbers"], call.params
        low = jax.lax.gather(
            self.a.astype(y.dtype),
            found.numbers(call)[..., None],
            d._replace(
                offset_dims=(call.operands[1].ndim - 1,),
                collapsed_slice_dims=(0,),
                start_index_map=(0,),
            ),
            (1, self.a.shape[-1]),
            mode=p["mode"],
            fill_value=p["fill_value"],
        )
        low = low * jnp.asarray(self.scale, low.dtype)
        return [y + found.arrange(low @ self.b.astype(y.dtype))]

    def _onto(self, low: Array, axis: int, dtype: Any) -> Array:
        """`low` with its rank axis at `axis` replaced by the output's width."""
        out = jnp.tensordot(
            low * jnp.asarray(self.scale, low.dtype), self.b.astype(dtype), (axis, 0)
        )
        return jnp.moveaxis(out, -1, axis)

    def rule_conv_general_dilated(self, call: Call, index: int) -> list[Any] | None:
        """A convolution to `rank` channels, then B on the channels."""
        p = call.params
        d = p["dimension_numbers"]
        if (
            index != 1
            or self._of("o") != [d.rhs_spec[0]]
            or self._of("b")
            or p["feature_group_count"] != 1
            or p["batch_group_count"] != 1
        ):
            return None
        x = call.operands[0]
        (y,) = call.rebind(1, self.base)
        low = jax.lax.conv_general_dilated(
            self._dropped(x),
            jnp.moveaxis(self.a, -1, d.rhs_spec[0]).astype(x.dtype),
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            d,
            precision=p["precision"],
        )
        return [y + self._onto(low, d.out_spec[1], y.dtype)]

    # -- the same weight, arranged otherwise ---------------------------------------------------

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """The transposed weight is a low-rank weight with its axes renamed."""
        order = call.params["permutation"]
        (base,) = call.rebind(index, self.base)
        return [self._permuted(base, order)]

    def _permuted(self, base: Any, order: Sequence[int]) -> LowRank:
        moved = {old: new for new, old in enumerate(order)}
        axes = "".join(self.kinds[i] for i in order)

        def by(factor: str) -> list[int]:
            present = self._order(factor)
            fixed = present.index(None)
            rest = [i for i in present if i is not None]
            rest.sort(key=lambda i: (self.kinds[i] != "b", moved[i]))
            places = [present.index(i) for i in rest]
            return [*places[:fixed], fixed, *places[fixed:]]

        key = self.key
        if key is not None:
            batch = self._of("b")
            key = key.transpose([batch.index(i) for i in sorted(batch, key=lambda i: moved[i])])
        return dataclasses.replace(
            self,
            base=base,
            a=self.a.transpose(by("a")),
            b=self.b.transpose(by("b")),
            key=key,
            axes=axes,
        )

    def _reshaped(self, call: Call, index: int) -> list[Any] | None:
        """Splitting or joining axes of one kind; axes of size 1 come and go freely."""
        new = call.shape
        kinds = reshaped_kinds(self.kinds, self.shape, new)
        if kinds is None:
            return None
        (base,) = call.rebind(index, self.base)
        sizes = {k: [n for n, kind in zip(new, kinds, strict=True) if kind == k] for k in "bio"}
        rank = self.a.shape[-1]
        return [
            dataclasses.replace(
                self,
                base=base,
                a=self.a.reshape(*sizes["b"], *sizes["i"], rank),
                b=self.b.reshape(*sizes["b"], rank, *sizes["o"]),
                key=None if self.key is None else self.key.reshape(sizes["b"]),
                axes=kinds,
            )
        ]

    rule_reshape = _reshaped
    rule_squeeze = _reshaped
    rule_expand_dims = _reshaped

    def rule_broadcast_in_dim(self, call: Call, index: int) -> list[Any] | None:
        """Only new axes of size 1, in order: a reshape. Real broadcasting has no rule."""
        kept = call.params["broadcast_dimensions"]
        new = call.params["shape"]
        same = [new[j] for j in kept] == list(self.shape) and list(kept) == sorted(kept)
        ones = all(n == 1 for j, n in enumerate(new) if j not in kept)
        return self._reshaped(call, index) if same and ones else None

    def _cut(self, base: Any, cut: Callable[[Array, int, int], Array]) -> LowRank:
        """`cut(array, axis, axis of the base)` on every array that has the axis."""

        def on(array: Array, order: Sequence[int | None]) -> Array:
            for axis, i in enumerate(order):
                if i is not None:
                    array = cut(array, axis, i)
            return array

        return dataclasses.replace(
            self,
            base=base,
            a=on(self.a, self._order("a")),
            b=on(self.b, self._order("b")),
            key=None if self.key is None else on(self.key, self._of("b")),
        )

    def rule_slice(self, call: Call, index: int) -> list[Any]:
        """A slice of the weight is the slice of the base and of the factors."""
        (base,) = call.rebind(index, self.base)
        starts, limits = call.params["start_indices"], call.params["limit_indices"]
        strides = call.params["strides"] or (1,) * self.ndim
        return [
            self._cut(
                base,
                lambda x, axis, i: jax.lax.slice_in_dim(x, starts[i], limits[i], strides[i], axis),
            )
        ]

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """As `slice`, at positions known at run time."""
        if index != 0:
            return None
        (base,) = call.rebind(0, self.base)
        starts, sizes = call.operands[1:], call.params["slice_sizes"]
        return [
            self._cut(
                base,
                lambda x, axis, i: jax.lax.dynamic_slice_in_dim(x, starts[i], sizes[i], axis),
            )
        ]
