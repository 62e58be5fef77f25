"""The names of the axes of trained arrays, from those of the parameters that they act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jpeft._compat import is_literal, open_jaxpr, shape_of
from jpeft.leaf import IN_PLACE, Leaf, is_leaf
from jpeft.paths import flatten
from jpeft.transform import Params, Trainable, Transform

# The names of a parameter's axes, from its path and shape, or None where nobody knows.
Axes = Callable[[str, tuple[int, ...]], "tuple[str | None, ...] | None"]


def trainable_axes(
    transform: Transform, params: Params, trainable: Trainable, axes: Axes
) -> Mapping[str, tuple[str | None, ...]]:
    """The names of the axes of every trained array that knows its place, by its path.

    LoRA's `a` of a kernel `(embed, mlp)` is `(embed, None)`, and its `b` `(None, mlp)`: what is
    sharded by names follows its base. An array that the method computes with before the model reads
    it, such as a subspace's coordinates, has no names.

    **Arguments:** `params` and `trainable`, arrays or their shapes; `axes`, the names of the
    parameters' axes.
    """
    rewritten: list[Any] = []

    def rewrite(params: Params, trainable: Trainable) -> Any:
        rewritten.append(transform.rewrite(params, trainable))
        return rewritten[0]

    closed = jax.make_jaxpr(rewrite)(params, trainable)
    program, _ = open_jaxpr(closed)
    specs = [
        spec for path, leaf in flatten(rewritten[0]).items() for spec in _specs(path, leaf, axes)
    ]
    # Where each result comes from, through what keeps every element in its place.
    source: dict[Any, Any] = {v: v for v in program.invars}
    for eqn in program.eqns:
        if eqn.primitive.name in IN_PLACE and not is_literal(eqn.invars[0]):
            source[eqn.outvars[0]] = source.get(eqn.invars[0])
    own = program.invars[len(jax.tree.leaves(params)) :]
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(trainable)[0]
    ]
    places = dict(zip(own, paths, strict=True))
    names: dict[str, tuple[str | None, ...]] = {}
    for var, spec in zip(program.outvars, specs, strict=True):
        at = None if is_literal(var) else source.get(var)
        if at in places and spec is not None:
            shape = shape_of(at)
            names[places[at]] = (*spec, *[None] * (len(shape) - len(spec)))
    return names


def leaf_axes(params: Params, axes: Axes) -> Mapping[str, tuple[str | None, ...]]:
    """The names of the axes of every array within a leaf of the tree, such as a quantised weight's
    codes and scales, by its path.

    **Arguments:** `params`, arrays or their shapes; `axes`, as `trainable_axes` has it.
    """
    names: dict[str, tuple[str | None, ...]] = {}
    for path, leaf in flatten(params).items():
        if not isinstance(leaf, Leaf):
            continue
        inside = jax.tree_util.tree_flatten_with_path(leaf)[0]
        for (key, x), spec in zip(inside, _specs(path, leaf, axes), strict=True):
            if spec is not None:
                at = f"{path}/{jax.tree_util.keystr(key, simple=True, separator='/')}"
                names[at] = (*spec, *[None] * (len(x.shape) - len(spec)))
    return names


def _specs(path: str, leaf: Any, axes: Axes) -> list[PartitionSpec | None]:
    """A spec of names for each array of a leaf, in tree order; None where nobody knows."""
    arrays = jax.tree.leaves(leaf)
    names = axes(path, tuple(leaf.shape))
    if names is None:
        return [None] * len(arrays)
    spec = PartitionSpec(*names)
    if not isinstance(leaf, Leaf):
        return [spec]
    found = jax.tree.leaves(
        leaf.specs(spec), is_leaf=lambda x: isinstance(x, PartitionSpec) and not is_leaf(x)
    )
    return list(found)
