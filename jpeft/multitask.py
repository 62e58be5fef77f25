"""Many tasks in one batch: each example is run with its own task's trained state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jpeft.leaf import IN_PLACE, Call, Leaf, LeafError, Site, Weight, dense, register, static
from jpeft.paths import TargetError, flatten, replace

T = TypeVar("T")
_FIXED = -1  # an array that all tasks share: a base's, a PRNG key

_ARRANGED = IN_PLACE | {
    "transpose",
    "reshape",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "slice",
    "dynamic_slice",
}


def stack(states: Sequence[T]) -> T:
    """Several trained states of one transform as one, with a new first axis that counts tasks.

    `transform.rewrite(params, stacked, task=ids)` then runs each example with its own.

    **Raises:** `ValueError` for none, and for states that differ in structure or shapes.
    """
    if not states:
        raise ValueError("jpeft.stack needs at least one trained state")
    first = _shapes(states[0])
    for i, state in enumerate(states[1:], 1):
        if jax.tree.structure(state) != jax.tree.structure(states[0]) or _shapes(state) != first:
            differing = [n for n, s in _shapes(state).items() if first.get(n) != s]
            differing += [n for n in first if n not in _shapes(state)]
            raise ValueError(
                f"state {i} is of another transform or model than state 0: they differ in "
                + (", ".join(f"'{n}'" for n in differing[:4]) or "their structure")
            )
    return jax.tree.map(lambda *xs: jnp.stack(xs), *states)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {p: tuple(jnp.shape(x)) for p, x in flatten(tree).items()}


def per_example(
    place: Callable[[Any, Any], Any], params: Any, stacked: Any, task: Int[Array, " b"]
) -> Any:
    """The parameters with a leaf that serves each example its own task at every place that
    `place(params, state)` rewrites.

    **Arguments:** `stacked`, trained states with a first axis of tasks; `task`, each example's
    number there, or -1 for the model as it is. Examples stand along axis 0 of activations.

    **Raises:** `TargetError` for a `task` that is no vector of integers, or unequal first axes.
    """
    task = jnp.asarray(task)
    if task.ndim != 1 or not jnp.issubdtype(task.dtype, jnp.integer):
        raise TargetError(
            f"task is a vector of integers, one an example; got {task.dtype}, shape {task.shape}"
        )
    counts = {jnp.shape(x)[:1] for x in jax.tree.leaves(stacked)}
    if len(counts) != 1 or counts == {()}:
        raise TargetError(
            "with task= the trained state has a first axis of tasks, made by jpeft.stack; the "
            f"first axes here are {sorted(counts)}"
        )
    old = flatten(params)

    def one(state: Any) -> dict[str, Leaf]:
        placed = flatten(place(params, state))
        return {p: _owned(x, old[p], p) for p, x in placed.items() if x is not old[p]}

    shape = jax.eval_shape(lambda s: one(jax.tree.map(lambda x: x[0], s)), stacked)
    levels = {p: _levels(leaf) - _levels(old[p]) for p, leaf in shape.items()}
    depth = {p: _stacked(leaf) for p, leaf in shape.items()}
    axes = [a for p, leaf in shape.items() for a in _axes(leaf, depth[p], levels[p])]
    flat = jax.vmap(
        lambda s: jax.tree.leaves(one(s)), out_axes=[None if a == _FIXED else a for a in axes]
    )(stacked)
    leaves: dict[str, Leaf] = jax.tree.unflatten(jax.tree.structure(shape), flat)
    new: dict[str, Any] = {}
    for path, leaf in leaves.items():
        batch = leaf.shape[: depth[path]]
        ids = jnp.broadcast_to(task, (*batch, *task.shape))
        new[path] = PerTask(leaf, ids, levels[path], path)
    return replace(params, new)


def _owned(x: Any, old: Any, path: str) -> Any:
    """A rewritten parameter whose nested leaves end in `old`, which all tasks share: what one task
    has in its place, such as a trained kernel under LoRA, becomes its `Own`.
    """
    if x is old:
        return x
    if isinstance(x, Leaf):
        return dataclasses.replace(x, base=_owned(x.base, old, path))  # type: ignore[type-var]
    return Own(old, x, path)


def _levels(x: Any) -> int:
    return 1 + _levels(x.base) if isinstance(x, Leaf) else 0


def _stacked(leaf: Any) -> int:
    """How many first axes of a rewritten parameter are stacked, as its leaves tell."""
    return max(leaf.leading, _stacked(leaf.base)) if isinstance(leaf, Leaf) else 0


def _axes(leaf: Any, depth: int, levels: int) -> list[int]:
    """The axis of tasks in every array of a leaf, in the order of its flattening."""

    def of(leaf: Any, levels: int) -> Any:
        if levels == 0:
            return jax.tree.map(lambda _: _FIXED, leaf)
        fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
        static_ = {f.name for f in dataclasses.fields(leaf) if f.metadata.get("static")}
        new = {
            n: of(x, levels - 1) if n == "base" else jax.tree.map(lambda x: _axis(x, depth), x)
            for n, x in fields.items()
            if n not in static_
        }
        return dataclasses.replace(leaf, **new)

    return jax.tree.leaves(of(leaf, levels))


def _axis(x: Any, depth: int) -> int:
    return _FIXED if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else depth


@register
@dataclasses.dataclass(frozen=True)
class Own(Weight):
    """A parameter of one task's own, such as its head: `value` stands for `base`."""

    base: Any
    value: Any
    path: str = static("")

    def materialise(self) -> Array:
        """The task's array."""
        return self.value

    def specs(self, spec: PartitionSpec) -> Any:
        """This leaf with a `PartitionSpec` for each array, when the base has `spec`."""
        inner = self.base.specs(spec) if isinstance(self.base, Leaf) else spec
        return dataclasses.replace(self, base=inner, value=spec)

    def rule(self, call: Call, index: int) -> list[Any]:
        """The value is computed with; what only arranges the array arranges both."""
        new = call.rebind(index, self.value)
        if call.name not in _ARRANGED:
            return new
        (base,) = call.rebind(index, self.base)
        return [dataclasses.replace(self, base=base, value=new[0])]

    def switched(self, on: Array) -> Own:
        """The base where `on` is false."""
        return dataclasses.replace(self, value=jnp.where(on, self.value, dense(self.base)))


@register
@dataclasses.dataclass(frozen=True)
class PerTask(Site):
    """One leaf for every task, of which each example meets its own.

    **Attributes:** `base`, the leaf, whose arrays have an axis of tasks after the stacked axes;
    `task`, `(*stacked, examples)`; `levels`, how many of the nested leaves have that axis.
    """

    base: Any
    task: Any
    levels: int = static(1)
    path: str = static("")

    def specs(self, spec: PartitionSpec) -> Any:
        """Not to be sharded by hand."""
        raise LeafError(f"the parameter '{self.path}' of many tasks cannot enter a shard_map")

    def scanned(self, length: int) -> PerTask:
        """With the layers' axis first: `Train` does not know that a parameter is stacked."""
        if self.task.ndim > 1:
            return self
        flat, tree = jax.tree.flatten(self.base)
        moved = [
            x if a == _FIXED or x.ndim < 2 else jnp.moveaxis(x, 0, 1)
            for x, a in zip(flat, _axes(self.base, 0, self.levels), strict=True)
        ]
        ids = jnp.broadcast_to(self.task, (length, *self.task.shape))
        return dataclasses.replace(self, base=jax.tree.unflatten(tree, moved), task=ids)

    def rule(self, call: Call, index: int) -> list[Any]:
        """Arranged for all tasks; used by each example with its own."""
        return [self._arranged(call, index)] if call.name in _ARRANGED else self._used(call, index)

    def _arranged(self, call: Call, index: int) -> PerTask:
        depth = self.task.ndim - 1
        flat, tree = jax.tree.flatten(self.base)
        axes = _axes(self.base, depth, self.levels)

        def one(*arrays: Any) -> Any:
            return _ruled(jax.tree.unflatten(tree, arrays), call, index)[0]

        firsts = [x if a == _FIXED else jnp.take(x, 0, a) for x, a in zip(flat, axes, strict=True)]
        shape = jax.eval_shape(one, *firsts)
        task, now = self._task_after(call, index, shape)
        out = jax.vmap(
            lambda *xs: jax.tree.leaves(one(*xs)),
            in_axes=[None if a == _FIXED else a for a in axes],
            out_axes=[None if a == _FIXED else a for a in _axes(shape, now, self.levels)],
        )(*flat)
        leaf = jax.tree.unflatten(jax.tree.structure(shape), out)
        return dataclasses.replace(self, base=leaf, task=task)

    def _task_after(self, call: Call, index: int, shape: Any) -> tuple[Any, int]:
        """The ids, and how many stacked axes lead, once the parameter has the new shape."""
        *batch, examples = self.task.shape
        new = shape.shape
        if list(new[: len(batch)]) == batch and call.name != "transpose":
            return self.task, len(batch)
        if call.name in ("slice", "dynamic_slice"):
            sizes = new[: len(batch)]
            ids = self.task[(0,) * len(batch)]
            return jnp.broadcast_to(ids, (*sizes, examples)), len(batch)
        if math.prod(batch) == 1:
            return self.task.reshape(examples), 0
        raise LeafError(
            f"'{self.path}' has a state for each task, and '{call.name}' moves its stacked axes"
        )

    def _used(self, call: Call, index: int) -> list[Any]:
        depth = self.task.ndim - 1
        ids = self.task[(0,) * depth]
        which, axis, after = self._examples(call, index)
        x = call.operands[which]
        flat, tree = jax.tree.flatten(self.base)
        axes = _axes(self.base, depth, self.levels)
        picked = [
            y if a == _FIXED else jnp.take(y, jnp.maximum(ids, 0), axis=a)
            for y, a in zip(flat, axes, strict=True)
        ]

        def one(x: Any, number: Any, on: Any, *arrays: Any) -> list[Any]:
            leaf = _switched(jax.tree.unflatten(tree, arrays), on, number, self.levels)
            operands = list(call.operands)
            operands[which] = jnp.expand_dims(x, axis)
            operands[index] = leaf
            return _ruled(leaf, dataclasses.replace(call, operands=tuple(operands)), index)

        results = jax.vmap(one, in_axes=(axis, 0, 0, *[None if a == _FIXED else a for a in axes]))(
            x, jnp.arange(ids.shape[0]), ids >= 0, *picked
        )
        out: list[Any] = []
        for y, v in zip(results, call.eqn.outvars, strict=True):
            y = jnp.moveaxis(y, 0, after)
            if y.shape[after + 1] != 1:
                raise self._unknown(call)
            out.append(jnp.squeeze(y, after + 1).reshape(v.aval.shape))  # type: ignore[attr-defined]
        return out

    def _examples(self, call: Call, index: int) -> tuple[int, int, int]:
        """Which operand holds the examples, along which axis, and along which of the result."""
        p = call.params
        which = 1 - index if len(call.operands) == 2 else None
        axis = after = 0
        if call.name == "dot_general" and which is not None:
            contract, batch = p["dimension_numbers"]
            x = call.operands[which]
            free = [i for i in range(x.ndim) if i not in (*contract[which], *batch[which])]
            mine = self.ndim - len(contract[index]) - len(batch[index])
            if 0 not in free:
                raise self._unknown(call)
            after = len(batch[index]) + (mine if index == 0 else 0)
        elif call.name == "gather" and index == 0:
            which = 1
            after = min(set(range(len(call.shape))) - set(p["dimension_numbers"].offset_dims))
        elif call.name == "conv_general_dilated" and index == 1:
            which, axis = 0, p["dimension_numbers"].lhs_spec[0]
            after = p["dimension_numbers"].out_spec[0]
        if which is None or isinstance(call.operands[which], Leaf):
            raise self._unknown(call)
        x = call.operands[which]
        if x.ndim == 0 or x.shape[axis] != self.task.shape[-1]:
            raise LeafError(
                f"'{self.path}' meets an array of shape {tuple(x.shape)} in '{call.name}', but "
                f"there are {self.task.shape[-1]} task ids: examples must stand along axis {axis}"
            )
        return which, axis, after

    def _unknown(self, call: Call) -> LeafError:
        return LeafError(
            f"'{self.path}' has a state for each task, and in '{call.name}' no axis counts the "
            "examples"
        )


def _ruled(leaf: Leaf, call: Call, index: int) -> list[Any]:
    results = leaf.rule(call, index)
    if results is None and isinstance(leaf, Weight):
        results = call.rebind(index, dense(leaf))
    if results is None:
        raise LeafError(
            f"{type(leaf).__name__} at '{leaf.path}' cannot be read by the operation "
            f"'{call.name}': target another parameter, or use another method there"
        )
    return results


def _switched(leaf: Any, on: Array, number: Array, levels: int) -> Any:
    """One example's leaf: without effect where `on` is false, and with randomness of its own."""
    if levels == 0:
        return leaf
    leaf = dataclasses.replace(leaf, base=_switched(leaf.base, on, number, levels - 1))
    leaf = leaf.switched(on)
    key = getattr(leaf, "key", None)
    if key is None:
        return leaf
    folded = jax.random.fold_in(key.reshape(-1)[0], number)
    return dataclasses.replace(leaf, key=jnp.broadcast_to(folded, key.shape))
