"""How a model uses each of its parameters, read off its program with probe leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jpeft._axes import regroup
from jpeft.leaf import Call, Weight, dense, is_leaf, register, static
from jpeft.paths import is_array, map_with_paths
from jpeft.rewrite import lift


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that reads a parameter. Axes are counted on the parameter as it is stored.

    **Attributes:** `primitive`, such as `dot_general`, `gather`, `conv_general_dilated`, `add`;
    `inputs`, the axes contracted with what comes in (or looked up); `outputs`, the axes that come
    out; `batch`, those shared by both; `scanned`, those that a loop or an index has sliced away.
    For an operation that is no product the three are empty.
    """

    primitive: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    scanned: tuple[int, ...] = ()

    @property
    def axes(self) -> str | None:
        """One letter an axis, `i`, `o` or `b` (batch or scanned); None for no product."""
        letters = dict.fromkeys((*self.batch, *self.scanned), "b")
        letters |= dict.fromkeys(self.outputs, "o") | dict.fromkeys(self.inputs, "i")
        if not self.inputs or sorted(letters) != list(range(len(letters))):
            return None
        return "".join(letters[i] for i in range(len(letters)))


Uses: TypeAlias = Mapping[str, tuple[Use, ...]]


def uses(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Uses:
    """How `apply(params, *args, **kwargs)` uses each parameter, in the program's order.

    Nothing is computed: arrays and `jax.ShapeDtypeStruct`s serve alike.

    **Returns:** `{path: (Use, ...)}`; a parameter that is not read has an empty tuple.
    """
    records: dict[str, list[Use]] = {}

    def probe(path: str, x: Any) -> Any:
        if not (is_leaf(x) or is_array(x)):
            return x
        records[path] = []
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        axes = tuple((i,) for i in range(x.ndim))
        return Probe(x, axes=axes, whole=x.ndim, path=path, record=_Record(records[path]))

    arrays, rest = _partition((params, args, kwargs))

    def on_arrays(arrays: Any) -> Any:
        params, args, kwargs = _join(arrays, rest)
        probes = map_with_paths(probe, params)
        return jax.tree.map(dense, lift(apply)(probes, *args, **kwargs), is_leaf=is_leaf)

    jax.eval_shape(on_arrays, arrays)
    return {path: tuple(dict.fromkeys(found)) for path, found in records.items()}


def _partition(tree: Any) -> tuple[list[Any], Any]:
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [x for x in leaves if is_array(x)]
    return arrays, (treedef, [None if is_array(x) else x for x in leaves], [*map(is_array, leaves)])


def _join(arrays: list[Any], rest: Any) -> Any:
    treedef, leaves, traced = rest
    of = iter(arrays)
    return jax.tree.unflatten(
        treedef, [next(of) if t else x for x, t in zip(leaves, traced, strict=True)]
    )


class _Record:
    """A list that counts as one value in a tree's structure, whatever is in it."""

    def __init__(self, found: list[Use]) -> None:
        self.found = found

    def __hash__(self) -> int:
        return id(self.found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Record) and self.found is other.found


@register
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
    """A leaf that records how it is read, and else is the parameter itself.

    `axes` gives, for each axis the model sees (aligned at the end), the stored axes behind it.
    """

    base: Any
    axes: tuple[tuple[int, ...], ...] = static()
    whole: int = static()
    path: str = static()
    record: _Record = static()

    @property
    def _seen(self) -> tuple[tuple[int, ...], ...]:
        extra = self.ndim - len(self.axes)
        return ((),) * extra + self.axes[max(-extra, 0) :]

    def _stored(self, axes: Any) -> tuple[int, ...]:
        return tuple(sorted({j for i in axes for j in self._seen[i]}))

    def _note(self, primitive: str, inputs: Any = (), batch: Any = ()) -> None:
        present = self._stored(range(self.ndim))
        scanned = tuple(i for i in range(self.whole) if i not in present)
        if not inputs:
            self.record.found.append(Use(primitive, scanned=scanned))
            return
        ins, shared = self._stored(inputs), self._stored(batch)
        outs = tuple(i for i in present if i not in ins and i not in shared)
        self.record.found.append(Use(primitive, ins, outs, shared, scanned))

    def materialise(self) -> jax.Array:
        """The parameter."""
        return dense(self.base)

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with the base's `PartitionSpec`."""
        return dataclasses.replace(self, base=spec)

    def rule(self, call: Call, index: int) -> list[Any] | None:
        """Record a use, or follow the parameter through a change of its shape."""
        structural = super().rule(call, index)
        if structural is not None:
            return structural
        p = call.params
        if call.name == "dot_general":
            contract, batch = p["dimension_numbers"]
            self._note(call.name, contract[index], batch[index])
        elif call.name == "gather" and index == 0:
            d = p["dimension_numbers"]
            looked_up = [
                i for i in d.start_index_map if p["slice_sizes"][i] != self.shape[i]
            ] or list(d.start_index_map)
            self._note(call.name, looked_up)
        elif call.name == "conv_general_dilated" and index == 1:
            out, *ins = p["dimension_numbers"].rhs_spec
            del out
            self._note(call.name, ins)
        else:
            self._note(call.name)
        return call.rebind(index, dense(self.base))

    def rule_transpose(self, call: Call, index: int) -> list[Any]:
        """The axes change places."""
        (base,) = call.rebind(index, self.base)
        axes = tuple(self._seen[i] for i in call.params["permutation"])
        return [dataclasses.replace(self, base=base, axes=axes)]

    def rule_reshape(self, call: Call, index: int) -> list[Any]:
        """An axis that is split or joined stands for the same stored axes."""
        (base,) = call.rebind(index, self.base)
        new = call.shape
        axes: list[tuple[int, ...]] = [()] * len(new)
        for before, after in regroup(self.shape, new):
            behind = tuple(j for i in before for j in self._seen[i])
            for j in after:
                axes[j] = behind
        return [dataclasses.replace(self, base=base, axes=tuple(axes))]

    rule_squeeze = rule_reshape

    def rule_broadcast_in_dim(self, call: Call, index: int) -> list[Any]:
        """New axes have no stored axis behind them."""
        (base,) = call.rebind(index, self.base)
        axes: list[tuple[int, ...]] = [()] * len(call.params["shape"])
        for i, j in enumerate(call.params["broadcast_dimensions"]):
            axes[j] = self._seen[i]
        return [dataclasses.replace(self, base=base, axes=tuple(axes))]

    def rule_slice(self, call: Call, index: int) -> list[Any]:
        """A part of the parameter is the parameter; an axis cut to one element is sliced away."""
        (base,) = call.rebind(index, self.base)
        sizes = call.shape
        axes = tuple(
            () if n == 1 and self.shape[i] != 1 else self._seen[i] for i, n in enumerate(sizes)
        )
        return [dataclasses.replace(self, base=base, axes=axes)]

    def rule_dynamic_slice(self, call: Call, index: int) -> list[Any] | None:
        """As `slice`."""
        return self.rule_slice(call, index) if index == 0 else None
