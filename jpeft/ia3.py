"""IA3: learned scales of activations; and BitFit, which is training the biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jpeft._states import check_kind, check_shapes, put
from jpeft.kernels import at, kernel_axes, leading, real
from jpeft.leaf import register, static
from jpeft.paths import by_pattern, flatten, match
from jpeft.rescale import Scaled
from jpeft.transform import Params, Train, Trainable, Transform
from jpeft.uses import Uses

_NONE: Mapping[str, str] = {}


@register
@dataclasses.dataclass(frozen=True)
class Scales:
    """What IA3 trains for one kernel.

    **Attributes:** `scale`, fp32 `(*batch, *outputs)`, or for a feed-forward kernel `(*batch,
    *inputs)`; `axes`, one letter for each axis of the kernel; `side`, the letter that it scales.
    """

    scale: Any
    axes: str = static("io")
    side: str = static("o")


@dataclasses.dataclass(frozen=True)
class IA3(Transform):
    """Multiply what kernels give, or what they take, by learned scales that start at one.

    **Arguments:**

    - `targets`: kernels whose outputs are scaled: the keys' and the values'.
    - `feedforward`: kernels whose inputs are scaled: the MLP's down-projection.
    - `axes`: pattern to letters, where neither the shape nor `uses` tells; see `LoRA`.

    Source: Liu et al. 2022, section 3.3.
    """

    targets: str | Sequence[str] = ()
    feedforward: str | Sequence[str] = ()
    axes: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: Scales}`, all ones."""
        del key
        leaves = flatten(params)
        sides: dict[str, str] = {}
        for patterns, side in ((self.targets, "o"), (self.feedforward, "i")):
            if patterns:
                sides |= dict.fromkeys(match(patterns, leaves), side)
        if not sides:
            match((), leaves)
        trainable: dict[str, Scales] = {}
        for path, side in sides.items():
            leaf = leaves[path]
            real("IA3", path, leaf)
            axes, _ = kernel_axes("IA3", path, leaf, by_pattern(self.axes, path, ""), uses)
            ones = jnp.ones(_shape(leaf, axes, side), jnp.float32)
            trainable[path] = Scales(ones, axes, side)
        return trainable

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `Scaled` leaf at every matched path."""
        del key
        return put(params, trainable, _leaf)


def _leaf(path: str, base: Any, s: Any) -> Scaled:
    check_kind(path, base, s, Scales)
    check_shapes(path, vars(s), {"scale": _shape(base, s.axes, s.side)})
    return Scaled(base, _gain(s), path, leading(s.axes))


def _shape(leaf: Any, axes: str, side: str) -> list[int]:
    """Of the scale."""
    return [leaf.shape[i] for i in (*at(axes, "b"), *at(axes, side))]


def _gain(s: Scales) -> Any:
    """The scale with all of the kernel's axes, in their order, of size 1 where it is constant."""
    kept = [*at(s.axes, "b"), *at(s.axes, s.side)]
    order = sorted(range(len(kept)), key=lambda i: kept[i])
    constant = [i for i in range(len(s.axes)) if i not in kept]
    return jnp.expand_dims(s.scale.transpose(order), constant)


def bitfit(targets: str = r"(^|/)bias$") -> Train:
    """Train the biases alone. Source: Ben Zaken et al. 2022."""
    return Train(targets)
