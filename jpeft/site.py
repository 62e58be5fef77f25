"""The frame of leaves that act on what a parameter produces: adapters and prefixes."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jpeft._axes import regroup
from jpeft.leaf import Call, Leaf, LeafError, Site


class Placed(Site):
    """A bias or a kernel whose result is changed: `f(y + bias)`, or `f(x W)`.

    Concrete leaves are frozen dataclasses with two static fields more than `base` and `path`:
    `outputs`, the parameter's output axes in the order in which it is stored, and `batch`, its
    stacked axes; both are counted from the end, and follow the parameter through the reshapes,
    casts and broadcasts that modules do before they use it. Every other array of the leaf (see
    `arrays`) starts with the stacked axes. Output axes are flattened in what they hold.
    """

    outputs: tuple[int, ...]
    batch: tuple[int, ...]

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[str, ...]:
        """The names of the fields that hold trained arrays."""

    @abc.abstractmethod
    def act(
        self, y: Float[Array, "*e *free d"], x: Float[Array, "*e *free i"] | None, free: int
    ) -> Float[Array, "*e *free d"]:
        """What becomes of the result.

        **Arguments:** `y`, the result, output axes last and flattened; `x`, what went into a
        kernel, laid out alike, None at a bias; `free`, how many axes stand between the stacked
        ones and the last.
        """

    @property
    def leading(self) -> int:
        """The first axes that are stacked."""
        batch = sorted(a + self.ndim for a in self.stacked)
        return len(batch) if batch == list(range(len(batch))) else 0

    @property
    def stacked(self) -> tuple[int, ...]:
        """The stacked axes that are still there, counted from the end."""
        return tuple(a for a in self.batch if a >= -self.ndim)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        of = dict(enumerate(spec))
        on = PartitionSpec(*[of.get(a + self.ndim) for a in self.stacked])
        return self._with(inner, lambda _: on)

    def divided(self, parts: Sequence[int]) -> Leaf:
        """This leaf, of which stacked axes alone are divided: it acts on a whole result."""
        stacked = [a + self.ndim for a in self.stacked]
        if any(n > 1 for i, n in enumerate(parts) if i not in stacked):
            raise LeafError(
                f"{type(self).__name__} at '{self.path}' acts on all that the parameter produces, "
                f"but a shard_map splits its shape {self.shape} into {tuple(parts)} parts: target "
                "a parameter that every device has whole, such as the bias added to the sum, or "
                "use LoRA here"
            )
        return super().divided(parts)

    def _with(self, base: Any, change: Callable[[Any], Any], **fields: Any) -> Any:
        """A copy with another base, and `change` done to every trained array."""
        found: dict[str, Any] = {n: getattr(self, n) for n in self.arrays}
        new = {n: None if x is None else change(x) for n, x in found.items()}
        return dataclasses.replace(self, base=base, **new, **fields)  # type: ignore[type-var]

    # -- use -----------------------------------------------------------------------------------

    def rule_add(self, call: Call, index: int) -> list[Any] | None:
        """A bias: `f(y + bias)`."""
        if isinstance(call.operands[1 - index], Leaf):
            return None
        (y,) = call.rebind(index, self.base)
        places = [a + y.ndim for a in self.outputs]
        return [self._acted(y, places, [a + y.ndim for a in self.stacked], None)]

    def rule_dot_general(self, call: Call, index: int) -> list[Any] | None:
        """A kernel: `f(x W)`."""
        contract, batch = call.params["dimension_numbers"]
        x, mine, my_batch = call.operands[1 - index], contract[index], list(batch[index])
        outputs = [a + self.ndim for a in self.outputs]
        free = [i for i in range(self.ndim) if i not in mine and i not in my_batch]
        stacked = [a + self.ndim for a in self.stacked]
        if isinstance(x, Leaf) or sorted(outputs) != free or sorted(stacked) != sorted(my_batch):
            return None
        (y,) = call.rebind(index, self.base)
        start = len(my_batch) if index == 0 else y.ndim - len(free)
        # The contracted axes of x in the order in which the parameter stores its own.
        order = sorted(range(len(mine)), key=lambda k: mine[k])
        x_places = [contract[1 - index][k] for k in order]
        x_batch = [batch[1 - index][my_batch.index(a)] for a in stacked]
        incoming = _flattened(x, x_places, x_batch)
        places = [start + free.index(o) for o in outputs]
        return [self._acted(y, places, [my_batch.index(a) for a in stacked], incoming)]

    def rule_conv_general_dilated(self, call: Call, index: int) -> list[Any] | None:
        """A convolution's kernel: `f` on the channels that come out."""
        d = call.params["dimension_numbers"]
        if index != 1 or [a + self.ndim for a in self.outputs] != [d.rhs_spec[0]] or self.stacked:
            return None
        (y,) = call.rebind(1, self.base)
        return [self._acted(y, [d.out_spec[1]], [], None)]

    def _acted(self, y: Array, outputs: Sequence[int], batch: Sequence[int], x: Any) -> Array:
        flat = _flattened(y, outputs, batch)
        out = self.act(flat, x, flat.ndim - 1 - len(batch))
        n, m = len(batch), len(outputs)
        out = out.reshape(*out.shape[:-1], *[y.shape[a] for a in outputs])
        return jnp.moveaxis(out, [*range(n), *range(y.ndim - m, y.ndim)], [*batch, *outputs])

    # -- the same parameter, arranged otherwise ------------------------------------------------

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """The axes change places."""
        order = list(call.params["permutation"])
        (base,) = call.rebind(index, self.base)
        n = self.ndim

        def moved(axes: Sequence[int]) -> tuple[int, ...]:
            return tuple(order.index(a + n) - n for a in axes)

        return [
            self._with(base, lambda x: x, outputs=moved(self.outputs), batch=moved(self.stacked))
        ]

    def rule_broadcast_in_dim(self, call: Call, index: int) -> list[Any] | None:
        """New axes; the parameter's own keep their sizes."""
        kept, new = call.params["broadcast_dimensions"], call.params["shape"]
        if [new[j] for j in kept] != list(self.shape):
            return None
        (base,) = call.rebind(index, self.base)
        n = self.ndim

        def moved(axes: Sequence[int]) -> tuple[int, ...]:
            return tuple(int(kept[a + n]) - len(new) for a in axes)

        return [
            self._with(base, lambda x: x, outputs=moved(self.outputs), batch=moved(self.stacked))
        ]

    def _reshaped(self, call: Call, index: int) -> list[Any] | None:
        """Output axes are split and joined among themselves; the others only come and go."""
        new, shape = call.shape, self.shape
        outputs, batch = (
            [a + self.ndim for a in self.outputs],
            [a + self.ndim for a in self.stacked],
        )
        place: dict[int, list[int]] = {}
        for before, after in regroup(shape, new):
            real = [i for i in before if shape[i] != 1] or list(before)
            kinds = {"o" if i in outputs else "b" if i in batch else "" for i in real}
            place |= {i: [] for i in before}
            if len(kinds) > 1:
                return None
            if kinds == {"o"}:
                first = outputs.index(real[0])
                if outputs[first : first + len(real)] != real:
                    return None  # transposed before: its order is no longer the stored one
                place[real[0]] = list(after)
            elif kinds == {"b"}:
                if len(real) > 1 or len(after) > 1:
                    return None
                place[real[0]] = list(after)
        gone = [k for k, i in enumerate(batch) if not place[i]]
        (base,) = call.rebind(index, self.base)
        return [
            self._with(
                base,
                lambda x: jnp.squeeze(x, gone),
                outputs=tuple(j - len(new) for i in outputs for j in place[i]),
                batch=tuple(j - len(new) for i in batch for j in place[i]),
            )
        ]

    rule_reshape = _reshaped
    rule_squeeze = _reshaped
    rule_expand_dims = _reshaped

    def rule_slice(self, call: Call, index: int) -> list[Any] | None:
        """Some of the stacked parameters."""
        starts, limits = call.params["start_indices"], call.params["limit_indices"]
        strides = call.params["strides"] or (1,) * self.ndim
        batch = [a + self.ndim for a in self.stacked]
        if any(n != self.shape[i] for i, n in enumerate(call.shape) if i not in batch):
            return None
        (base,) = call.rebind(index, self.base)
        cut = tuple(slice(starts[i], limits[i], strides[i]) for i in batch)
        return [self._with(base, lambda x: x[cut])]

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """As `slice`, at positions known at run time."""
        batch = [a + self.ndim for a in self.stacked]
        if index != 0 or any(
            n != self.shape[i] for i, n in enumerate(call.shape) if i not in batch
        ):
            return None
        (base,) = call.rebind(0, self.base)

        def cut(x: Array) -> Array:
            for k, i in enumerate(batch):
                x = jax.lax.dynamic_slice_in_dim(x, call.operands[1 + i], call.shape[i], k)
            return x

        return [self._with(base, cut)]


def _flattened(x: Array, last: Sequence[int], first: Sequence[int]) -> Array:
    """`first` axes to the front, `last` ones to the end and joined, the others between."""
    rest = [i for i in range(x.ndim) if i not in last and i not in first]
    x = x.transpose([*first, *rest, *last])
    return x.reshape(*x.shape[: x.ndim - len(last)], math.prod(x.shape[x.ndim - len(last) :]))
