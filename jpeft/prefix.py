"""Multi-layer prompts: learned keys and values, or activations, at virtual positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jpeft._states import check_kind, check_shapes, put
from jpeft.kernels import at, fold, placed_axes
from jpeft.leaf import LeafError, register, static
from jpeft.paths import TargetError, by_pattern, flatten, match
from jpeft.site import Placed
from jpeft.transform import Nothing, Params, Trainable, Transform
from jpeft.uses import Uses

_NONE: Mapping[str, Any] = {}


@register
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What is trained for one parameter: `values`, fp32 `(*batch, length, outputs)`; `axes`, one
    letter for each axis of the parameter, `b` stacked, `i` input, `o` output.
    """

    values: Any
    axes: str = static("o")


@register
@dataclasses.dataclass(frozen=True)
class PrefixMLP:
    """What is trained with the reparametrisation, all fp32: `embedding`, `(length, width)`; `down`,
    `(width, size)`, and `down_bias`; `up`, `(size, total)`, and `up_bias`; `shapes`, for each
    parameter in order its path, letters and the shape of its `Prefix`.
    """

    embedding: Any
    down: Any
    down_bias: Any
    up: Any
    up_bias: Any
    shapes: tuple[tuple[str, str, tuple[int, ...]], ...] = static()

    def folded(self) -> dict[str, Prefix]:
        """The prefixes that the network gives now."""
        low = jnp.tanh(self.embedding @ self.down + self.down_bias)
        flat = low @ self.up + self.up_bias  # (length, total)
        out: dict[str, Prefix] = {}
        start = 0
        for path, axes, (*batch, length, width) in self.shapes:
            end = start + math.prod(batch) * width
            part = flat[:, start:end].reshape(length, *batch, width)
            out[path] = Prefix(jnp.moveaxis(part, 0, -2), axes)
            start = end
        return out


@register
@dataclasses.dataclass(frozen=True)
class Prefixed(Placed):
    """What the parameter produces, replaced at positions `after` to `after + length`."""

    base: Any
    values: Any
    on: Any = None
    after: int = static(0)
    position: int = static(-1)
    outputs: tuple[int, ...] = static(())
    batch: tuple[int, ...] = static(())
    path: str = static("")

    @property
    def arrays(self) -> tuple[str, ...]:
        """The prefix, and whether it is on."""
        return ("values", "on")

    def act(self, y: Array, x: Array | None, free: int) -> Array:
        """`y` with the prefix in place."""
        del x
        if self.values.ndim > 2:
            raise LeafError(
                f"the prefix at '{self.path}' is on a parameter with a batch axis of its own, such "
                "as an expert's: target another one"
            )
        axis = free + self.position
        length = self.values.shape[0]
        if not 0 <= axis < free or y.shape[axis] < self.after + length:
            found = y.shape[axis] if 0 <= axis < free else "no"
            raise LeafError(
                f"the prefix at '{self.path}' takes positions {self.after} to "
                f"{self.after + length}, but there are {found} positions: put virtual tokens into "
                "the input (jpeft.virtual_tokens); steps of generation that read a cache take "
                "transform.decoding()"
            )
        others = [i for i in range(free) if i != axis]
        new = jnp.expand_dims(self.values.astype(y.dtype), [i for i in others if i < axis])
        new = jnp.expand_dims(new, [i for i in others if i > axis])
        shape = list(y.shape)
        shape[axis] = length
        new = jnp.broadcast_to(new, shape)
        stop = self.after + length
        if self.on is not None:
            new = jnp.where(self.on, new, jax.lax.slice_in_dim(y, self.after, stop, axis=axis))
        head = jax.lax.slice_in_dim(y, 0, self.after, axis=axis)
        tail = jax.lax.slice_in_dim(y, stop, None, axis=axis)
        return jnp.concatenate([head, new, tail], axis=axis)

    def switched(self, on: Array) -> Prefixed:
        """This leaf, doing nothing where `on` is false."""
        return dataclasses.replace(self, on=on)


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Transform):
    """Learned activations at `length` virtual positions of the input, in every layer.

    On the keys' and values' projections this is prefix tuning: every token of the input attends
    to learned keys and values. On the biases of each layer's last norm it is the variant that
    replaces the hidden states themselves. `jpeft.virtual_tokens` makes room for the positions in
    a batch; what stands there is not read. Keys are set where they are projected: a rotary
    embedding that follows turns them as it turns every key, by their virtual positions. With
    grouped-query attention they have the width of the key and value heads.

    **Arguments:**

    - `length`: of the prefix.
    - `targets`: the biases of the key and value projections, or where there are none the kernels.
    - `mlp`: None, or the width of a network (linear, tanh, linear) that all prefixes are computed
      by in training; `folded` removes it afterwards.
    - `after`: the prefix stands after so many tokens, 1 for encoders whose first token is read.
    - `std`: the deviation of the normal start. There is no start that leaves the model's output
      as it was: attention always spends some weight on a prefix.
    - `position`: which axis of the activations counts positions, from the end, features apart.
    - `axes`: pattern to letters, one for each axis of the parameter (`i`, `o`, `b`), where neither
      its shape nor `uses` tells.

    Source: Li & Liang 2021, section 4; Liu et al. 2022 (P-tuning v2), section 3.
    """

    length: int = 16
    targets: str | Sequence[str] = ()
    mlp: int | None = None
    after: int = 0
    std: float = 0.02
    position: int = -1
    axes: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"a prefix has at least 1 position, got {self.length}")
        if self.position >= 0:
            raise ValueError(f"position counts from the end (-1, -2, ...), got {self.position}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: Prefix}` for every matched parameter; with `mlp`, `{"mlp": PrefixMLP}`."""
        leaves = flatten(params)
        shapes: list[tuple[str, str, tuple[int, ...]]] = []
        for path in match(self.targets, leaves):
            leaf = leaves[path]
            axes = placed_axes("PrefixTuning", path, leaf, by_pattern(self.axes, path, ""), uses)
            if isinstance(leaf, Prefixed) and not (
                leaf.after + leaf.values.shape[-2] <= self.after
                or self.after + self.length <= leaf.after
            ):
                raise TargetError(
                    f"'{path}' already has a prefix at positions {leaf.after} to "
                    f"{leaf.after + leaf.values.shape[-2]}: give this one another after="
                )
            shapes.append((path, axes, self._shape(leaf, axes)))
        if self.mlp is None:
            return {
                path: Prefix(self.std * jax.random.normal(fold(key, path), shape), axes)
                for path, axes, shape in shapes
            }
        width = max(shape[-1] for *_, shape in shapes)
        total = sum(math.prod(shape) // self.length for *_, shape in shapes)
        keys = jax.random.split(key, 3)
        return {
            "mlp": PrefixMLP(
                jax.random.normal(keys[0], (self.length, width)),
                jax.random.normal(keys[1], (width, self.mlp)) / math.sqrt(width),
                jnp.zeros(self.mlp),
                # The same deviation as without the network: tanh of a normal has about 0.63.
                self.std / 0.63 * jax.random.normal(keys[2], (self.mlp, total)) / self.mlp**0.5,
                jnp.zeros(total),
                tuple(shapes),
            )
        }

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `Prefixed` leaf at every matched path."""
        del key
        return put(params, _prefixes(trainable), self._leaf)

    def folded(self, trainable: Trainable) -> tuple[PrefixTuning, Trainable]:
        """After training: the transform without its network, and the prefixes as they are."""
        return dataclasses.replace(self, mlp=None), _prefixes(trainable)

    def decoding(self) -> Transform:
        """For steps of generation that read a cache: the prefix is in it already."""
        return Nothing(self)

    def _shape(self, leaf: Any, axes: str) -> tuple[int, ...]:
        """Of a parameter's prefix."""
        batch = [leaf.shape[i] for i in at(axes, "b")]
        return (*batch, self.length, math.prod(leaf.shape[i] for i in at(axes, "o")))

    def _leaf(self, path: str, base: Any, prefix: Any) -> Prefixed:
        check_kind(path, base, prefix, Prefix)
        check_shapes(path, vars(prefix), {"values": self._shape(base, prefix.axes)})
        n = len(prefix.axes)
        outputs, batch = (tuple(i - n for i in at(prefix.axes, k)) for k in "ob")
        return Prefixed(base, prefix.values, None, self.after, self.position, outputs, batch, path)


def _prefixes(trainable: Trainable) -> Any:
    mlp = trainable.get("mlp") if isinstance(trainable, Mapping) else None
    return mlp.folded() if isinstance(mlp, PrefixMLP) else trainable
