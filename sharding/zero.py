"""ZeRO's stages as shardings of any tree: what of parameters, gradients and state each device has.

Rajbhandari et al. 2020. Nothing here communicates: the compiler puts in the collectives that these
shardings of a step's arguments and results call for.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The names of a leaf's axes, from its `/`-joined path and shape, or None where nobody knows.
Axes = Callable[[str, tuple[int, ...]], "tuple[str | None, ...] | None"]

# The mesh axis that an axis of each name is split over; `fsdp` finds an axis by itself.
RULES: Mapping[str, str | None] = {
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}
BATCH = ("data", "fsdp")
# Paths of parameters whose first axis is the layers'.
STACKED = r"(^|/)(layers?|blocks?)/(?!\d)"
# A leaf of so many elements is to be split, whatever its path says, or it is told.
LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class Zero:
    """Where each array of a training step stands on a mesh.

    | stage | parameters | gradients | optimiser state |
    |---|---|---|---|
    | 0, data parallel (DDP) | whole | whole | whole |
    | 1 | whole | whole while they are summed | sharded |
    | 2 | whole | sharded | sharded |
    | 3, fully sharded (FSDP) | sharded | sharded | sharded |

    The batch is split over `data` and `fsdp` at every stage. What is sharded is sharded over
    `fsdp`; over `tensor`, parameters are split by the names of their axes at every stage. At stage
    3 a layer's parameters are gathered where it uses them and dropped after: in a scan over layers
    that is one layer at a time, in the backward pass again (`sharding.gather`). Layers in a Python
    loop are gathered one by one too, but kept for the backward pass unless each is in
    `jax.checkpoint`.

    Nothing is padded: a leaf of which `fsdp` divides no axis stays whole on every device. Of leaves
    of 2**20 elements or more a warning names those, where they would be sharded.

    **Arguments:** `rules`, from names of axes to axes of the mesh; `smallest`, leaves of fewer
    elements (of one layer) are not worth a collective and stay whole; `stacked`, a pattern of
    paths whose first axis is the layers', where no names tell. It also matches one block's
    `block/kernel`: a leaf of 2**20 elements or more is split though its layers would be small.

    **Raises:** `ValueError` for a stage that is none, a mesh without `fsdp`, or rules that name an
    axis which the mesh does not have.
    """

    mesh: Mesh
    stage: int = 3
    rules: Mapping[str, str | None] = dataclasses.field(default_factory=lambda: RULES)
    smallest: int = 2**14
    stacked: str = STACKED

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3; got {self.stage}")
        if "fsdp" not in self.mesh.shape:
            raise ValueError(f"the mesh has no axis 'fsdp': {dict(self.mesh.shape)}")
        for name, axis in self.rules.items():
            if axis is not None and axis not in self.mesh.shape:
                raise ValueError(f"the rule {name} -> {axis}: the mesh has {dict(self.mesh.shape)}")

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self, tree: Any, axes: Axes | None = None) -> Any:
        """The sharding of every leaf of a tree of parameters."""
        return self._tree(tree, axes, self.stage >= 3)

    def gradients(self, tree: Any, axes: Axes | None = None) -> Any:
        """The sharding of every gradient, from the tree of what is trained."""
        return self._tree(tree, axes, self.stage >= 2)

    def reduced(self, tree: Any, axes: Axes | None = None) -> Any:
        """The sharding of every gradient as the optimiser reads it."""
        return self._tree(tree, axes, self.stage >= 1)

    def used(self, tree: Any, axes: Axes | None = None) -> Any:
        """The sharding of every parameter where a layer reads it: gathered over `fsdp`."""
        return self._tree(tree, axes, False)

    def optimiser(self, state: Any, params: Any, axes: Axes | None = None) -> Any:
        """The sharding of every array of an optimiser's state.

        An array whose path ends as a parameter's, and that has its shape (a moment, a master copy)
        or as many axes and a shape that can be split like it (scales of a moment's blocks), is
        sharded as that parameter; another one by its size.

        **Arguments:** `state`, what `optimiser.init(params)` gives, or its shapes; `params`, what
        is trained.
        """
        sharded = self.stage >= 1
        known = {
            path: (tuple(x.shape), self._names(path, tuple(x.shape), axes))
            for path, x in _flat(params).items()
        }

        def of(path: Any, x: Any) -> NamedSharding:
            name, shape = path_string(path), tuple(x.shape)
            parts = name.split("/")
            for i in range(len(parts) + 1):
                tail = "/".join(parts[i:])
                if tail not in known or len(known[tail][0]) != len(shape):
                    continue
                sharding = self._sharding(tail, *known[tail], sharded)
                if known[tail][0] == shape or _divides(sharding, shape):
                    return sharding
            return self._sharding(name, shape, None, sharded)

        return jax.tree_util.tree_map_with_path(of, state)

    def batch(self, tree: Any, accumulate: int = 1) -> Any:
        """The sharding of a batch: rows over `data` and `fsdp`, scalars whole.

        **Arguments:** `accumulate`, in so many parts is it taken.

        **Raises:** `ValueError` for rows that do not divide evenly.
        """
        present = tuple(a for a in BATCH if a in self.mesh.shape)
        parts = 1
        for name in present:
            parts *= self.mesh.shape[name]

        def of(path: Any, x: Any) -> NamedSharding:
            if not x.shape:
                return self.replicated
            if x.shape[0] % (parts * accumulate):
                taken = f" in {accumulate} parts" if accumulate > 1 else ""
                raise ValueError(
                    f"{batch_string(path)} has {x.shape[0]} rows, which {parts} devices cannot "
                    f"share evenly{taken}: change the batch size, or the mesh"
                )
            return NamedSharding(self.mesh, PartitionSpec(present))

        return jax.tree_util.tree_map_with_path(of, tree)

    # -- how one leaf is split ----------------------------------------------------------------

    def _tree(self, tree: Any, axes: Axes | None, sharded: bool) -> Any:
        whole: list[str] = []

        def of(path: Any, x: Any) -> NamedSharding:
            name, shape = path_string(path), tuple(x.shape)
            where = self._sharding(name, shape, self._names(name, shape, axes), sharded)
            split = any("fsdp" in (axis or ()) for axis in where.spec)
            if not split and math.prod(shape) >= max(LARGE, self.smallest):
                whole.append(f"'{name}' {shape}")
            return where

        shardings = jax.tree_util.tree_map_with_path(of, tree)
        parts = self.mesh.shape["fsdp"]
        if whole and sharded and parts > 1:
            # From one line, so that Python tells it once for every step, state and gradient.
            warnings.warn(
                f"stage {self.stage} leaves whole on every device what fsdp={parts} cannot split "
                f"evenly: {', '.join(whole)}",
                stacklevel=1,
            )
        return shardings

    def _names(
        self, path: str, shape: tuple[int, ...], axes: Axes | None
    ) -> tuple[str | None, ...] | None:
        names = None if axes is None else axes(path, shape)
        if names is not None and len(names) != len(shape):
            raise ValueError(f"'{path}' has shape {shape}, and the axis names {names}")
        return names

    def _sharding(
        self,
        path: str,
        shape: tuple[int, ...],
        names: tuple[str | None, ...] | None,
        sharded: bool,
    ) -> NamedSharding:
        over: list[list[str]] = [[] for _ in shape]
        layers = self._layers(path, shape, names)
        if names is not None:
            for i, name in enumerate(names):
                axis = None if name is None else self.rules.get(name)
                if axis is None or axis == "fsdp" or any(axis in o for o in over):
                    continue
                if self.mesh.shape[axis] > 1 and shape[i] % self.mesh.shape[axis] == 0:
                    over[i].append(axis)
        if sharded and self.mesh.shape["fsdp"] > 1:
            chosen = self._fsdp_axis(shape, names, over, layers)
            if chosen is not None:
                over[chosen].append("fsdp")
        spec = [tuple(o) if len(o) > 1 else (o[0] if o else None) for o in over]
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _layers(
        self, path: str, shape: tuple[int, ...], names: tuple[str | None, ...] | None
    ) -> set[int]:
        """The axes that are the layers'."""
        if names is not None:
            return {i for i, name in enumerate(names) if name == "layers"}
        return {0} if len(shape) > 1 and re.search(self.stacked, path) else set()

    def _fsdp_axis(
        self,
        shape: tuple[int, ...],
        names: tuple[str | None, ...] | None,
        over: list[list[str]],
        layers: set[int],
    ) -> int | None:
        """The axis that `fsdp` splits: the rules' one, else one that it divides, but the layers'.

        With names that is the first one: compilers scatter sums along the first axis of a matrix,
        and along another one they sum whole matrices and drop most of them. Without names the
        largest, since the first may be an axis of layers that nobody told of.
        """
        parts = self.mesh.shape["fsdp"]
        large = math.prod(shape) >= max(LARGE, self.smallest)
        one = math.prod(n for i, n in enumerate(shape) if i not in layers)

        def room(i: int) -> int:
            taken = 1
            for axis in over[i]:
                taken *= self.mesh.shape[axis]
            return shape[i] // taken

        divided = [i for i in range(len(shape)) if room(i) % parts == 0]
        free = [i for i in divided if i not in layers]
        if one < self.smallest and (names is not None or not large):
            return None
        if names is not None:
            for i in free:
                if self.rules.get(names[i] or "") == "fsdp":
                    return i
            return min(free, default=None)
        if large and not free:
            free = divided  # only the path says that its first axis is the layers'
        return max(free, key=lambda i: (room(i), -i), default=None)


def axes_by_pattern(table: tuple[tuple[str, tuple[str | None, ...]], ...]) -> Axes:
    """The names of axes from a table of patterns of paths, as models keep one (`AXES`)."""
    patterns = [(re.compile(pattern), names) for pattern, names in table]

    def axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...] | None:
        for pattern, names in patterns:
            if pattern.search(path) and len(names) == len(shape):
                return names
        return None

    return axes


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be split so, evenly."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def path_string(path: Any) -> str:
    """A path of a tree as patterns read it, `layers/attention/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_string(path: Any) -> str:
    """An array of a batch as messages have it: `'ids' of the batch`."""
    name = path_string(path)
    return f"'{name}' of the batch" if name else "the batch"


def _flat(tree: Any) -> dict[str, Any]:
    return {path_string(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
