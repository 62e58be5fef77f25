"""LoRA and its kin: rsLoRA, DoRA, patterns of ranks, fused kernels."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jpeft._states import check_kind, check_shapes, put
from jpeft.kernels import at, fold, kernel_axes, leading, real
from jpeft.leaf import Leaf, dense, register, static
from jpeft.lowrank import LowRank
from jpeft.paths import TargetError, by_pattern, flatten, match, replace
from jpeft.rescale import Scaled
from jpeft.transform import Params, Trainable, Transform
from jpeft.uses import Uses

_NONE: Mapping[str, Any] = {}


@register
@dataclasses.dataclass(frozen=True)
class Factors:
    """What LoRA trains for one parameter.

    **Attributes:** `a`, fp32 `(*batch, *inputs, rank)`; `b`, fp32 `(*batch, rank, *outputs)`;
    `magnitude`, None, or for DoRA fp32, the parameter's axes without its inputs, in its order;
    `axes`, one letter for each axis of the parameter, `b` batch, `i` input, `o` output.

    For a fused kernel with `n` trained parts, `a` has `n * rank` columns, and `b` as many rows,
    over the width of one part: rows `k * rank` to `(k + 1) * rank` belong to the k-th trained one.
    """

    a: Any
    b: Any
    magnitude: Any = None
    axes: str = static("io")

    def first(self, rank: int) -> Factors:
        """The first columns of A and rows of B: an update of a smaller rank."""
        b = jax.lax.slice_in_dim(self.b, 0, rank, axis=self.axes.count("b"))
        return dataclasses.replace(self, a=self.a[..., :rank], b=b)


@dataclasses.dataclass(frozen=True)
class LoRA(Transform):
    """Low-rank updates `W + (alpha / rank) A B` of the matched parameters.

    A starts Kaiming-uniform and B at zero, for look-up tables A at zero and B normal, so that
    training starts at the model itself.

    **Arguments:**

    - `rank`, `alpha`: the update's rank, and its scale's numerator.
    - `targets`: regular expressions, searched in `/`-joined paths; each must match a parameter.
      In Flax's names `r"kernel$"` is every linear layer, `r"^(?!lm_head|head).*kernel$"` all but
      those that begin so.
    - `dropout`: of the low-rank branch's input, when `rewrite` is given a key.
    - `rslora`: scale by `alpha / sqrt(rank)` (Kalajdzievski 2023).
    - `dora`: train a magnitude for each output too (Liu et al. 2024); its norm is a constant to
      the gradient.
    - `rank_pattern`, `alpha_pattern`: other values where a pattern is found in the path.
    - `axes`: pattern to letters, one for each axis of the parameter (`i`, `o`, `b`), where neither
      its shape nor `uses` tells; `{r"query/kernel$": "ioo"}`.
    - `parts`: for fused kernels, pattern to `(parts, trained)`: `{r"c_attn": (3, (0, 2))}` trains
      separate updates of q and v in a kernel that holds q, k, v side by side along its last
      output axis, as the paper does for GPT-2. Without it the fused kernel has one update.

    Source: Hu et al. 2021, section 4.1.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: str | Sequence[str] = ()
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=lambda: _NONE)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=lambda: _NONE)
    axes: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)
    parts: Mapping[str, tuple[int, tuple[int, ...]]] = dataclasses.field(
        default_factory=lambda: _NONE
    )

    def __post_init__(self) -> None:
        ranks = [self.rank, *self.rank_pattern.values()]
        if any(r < 1 for r in ranks):
            raise ValueError(f"a LoRA rank must be at least 1, got {min(ranks)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{path: Factors}` for every matched parameter."""
        leaves = flatten(params)
        chosen = match(self.targets, leaves)
        for patterns in (self.rank_pattern, self.alpha_pattern, self.axes, self.parts):
            for pattern in patterns:
                match(pattern, chosen)
        return {path: self._factors(key, path, leaves[path], uses) for path in chosen}

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters with a `LowRank` leaf (for DoRA, rescaled) at every matched path."""

        def rewritten(path: str, leaf: Any, f: Any) -> Leaf:
            return self._leaf(path, leaf, f, None if key is None else fold(key, path))

        return put(params, trainable, rewritten)

    def scale(self, path: str) -> float:
        """The factor of the update at `path`: `alpha / rank`, or `alpha / sqrt(rank)`."""
        rank = by_pattern(self.rank_pattern, path, self.rank)
        alpha = by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def unmerge(self, merged: Params, trainable: Trainable) -> Params:
        """The base parameters again, from merged ones: the update is subtracted, in fp32.

        **Raises:** `ValueError` for DoRA, whose merging loses the weight's norm; `TargetError`
        when `trainable` belongs to other parameters.
        """
        if self.dora:
            raise ValueError("DoRA cannot be unmerged: keep the base parameters")
        opposite = {path: dataclasses.replace(f, b=-f.b) for path, f in trainable.items()}
        base = flatten(self.place(merged, opposite))
        return replace(merged, {path: dense(base[path]) for path in trainable})

    # -- building ----------------------------------------------------------------------------

    def _factors(self, key: Any, path: str, leaf: Any, uses: Uses | None) -> Factors:
        real("LoRA", path, leaf)
        axes, table = kernel_axes("LoRA", path, leaf, by_pattern(self.axes, path, ""), uses)
        shape = {
            k: [n for n, kind in zip(leaf.shape, axes, strict=True) if kind == k] for k in "bio"
        }
        fan_in, fan_out = math.prod(shape["i"]), math.prod(shape["o"])
        rank = by_pattern(self.rank_pattern, path, self.rank)
        n_parts, trained = by_pattern(self.parts, path, (1, (0,)))
        if shape["o"][-1] % n_parts or not all(0 <= k < n_parts for k in trained) or not trained:
            raise TargetError(
                f"'{path}' has outputs {tuple(shape['o'])}: they do not split into {n_parts} equal "
                f"parts of which {trained} are trained"
            )
        shape["o"][-1] //= n_parts
        if rank > min(fan_in, fan_out // n_parts):
            raise TargetError(
                f"rank {rank} is above the size of '{path}', which is "
                f"{fan_in} in and {fan_out // n_parts} out: choose a rank of at most "
                f"{min(fan_in, fan_out // n_parts)}"
            )
        shapes = self._shapes(path, leaf, axes)
        a_shape, b_shape = shapes["a"], shapes["b"]
        key = fold(key, path)
        if table:
            a, b = jnp.zeros(a_shape), jax.random.normal(key, b_shape)
        else:
            # Kaiming-uniform with a = sqrt(5), as torch: a bound of 1 / sqrt(inputs).
            bound = 1 / math.sqrt(fan_in)
            a, b = jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), jnp.zeros(b_shape)
        magnitude = None
        if self.dora:
            magnitude = jnp.squeeze(column_norm(dense(leaf), axes), at(axes, "i"))
        return Factors(a.astype(jnp.float32), b.astype(jnp.float32), magnitude, axes)

    def _shapes(self, path: str, leaf: Any, axes: str) -> dict[str, tuple[int, ...]]:
        """Of the factors of a parameter."""
        of = {k: [leaf.shape[i] for i in at(axes, k)] for k in "bio"}
        n_parts, trained = by_pattern(self.parts, path, (1, (0,)))
        of["o"][-1] //= n_parts
        width = by_pattern(self.rank_pattern, path, self.rank) * len(trained)
        return {"a": (*of["b"], *of["i"], width), "b": (*of["b"], width, *of["o"])}

    def _leaf(self, path: str, base: Any, f: Any, key: Any) -> Leaf:
        check_kind(path, base, f, Factors)
        check_shapes(path, vars(f), self._shapes(path, base, f.axes))
        if (f.magnitude is not None) != self.dora:
            raise TargetError(
                f"the trained state at '{path}' is of LoRA with dora={not self.dora}, the "
                f"transform has dora={self.dora}"
            )
        b = f.b
        n_parts, trained = by_pattern(self.parts, path, (1, (0,)))
        if n_parts > 1:
            b = block_rows(b, n_parts, trained, f.axes.count("b"))
        batch = tuple(n for n, kind in zip(base.shape, f.axes, strict=True) if kind == "b")
        if key is not None and self.dropout:
            key = jax.random.split(key, batch) if batch else key
        else:
            key = None
        leaf = LowRank(base, f.a, b, key, self.scale(path), self.dropout, f.axes, path)
        if f.magnitude is None:
            return leaf
        norm = jax.lax.stop_gradient(_updated_norm(leaf))
        magnitude = jnp.expand_dims(f.magnitude, at(f.axes, "i"))
        # A column of zeros has no direction: a gain of one lets B give it one.
        gain = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)
        return Scaled(leaf, gain, path, leading(f.axes))


def column_norm(weight: Array, axes: str, extra: Array | float = 0.0) -> Array:
    """The fp32 norm over a weight's inputs, of size 1 there; `extra` is added to its square."""
    square = jnp.sum(weight.astype(jnp.float32) ** 2, axis=at(axes, "i"), keepdims=True)
    # Where both cancel, rounding may leave less than nothing.
    return jnp.sqrt(jnp.maximum(square + extra, 0))


def block_rows(b: Array, parts: int, trained: Sequence[int], n_batch: int) -> Array:
    """B of a fused kernel over its whole width: each trained part's rows reach that part alone.

    `(*batch, len(trained) * rank, ..., width)` to `(*batch, len(trained) * rank, ..., parts *
    width)`.
    """
    rows = jnp.split(b, len(trained), axis=n_batch)
    width = b.shape[-1]
    placed = [
        jnp.pad(r, [(0, 0)] * (b.ndim - 1) + [(k * width, (parts - 1 - k) * width)])
        for r, k in zip(rows, trained, strict=True)
    ]
    return jnp.concatenate(placed, axis=n_batch)


def _updated_norm(leaf: LowRank) -> Array:
    """`||W + s A B||` over the inputs, from the factors: the sum is never formed."""
    letters = string.ascii_lowercase[: leaf.ndim]
    of = {
        k: "".join(x for x, kind in zip(letters, leaf.axes, strict=True) if kind == k)
        for k in "bio"
    }
    a, b, w = leaf.scale * leaf.a, leaf.b, dense(leaf.base).astype(leaf.a.dtype)
    a_is, b_is = f"{of['b']}{of['i']}z", f"{of['b']}z{of['o']}"
    cross = jnp.einsum(f"{a_is},{letters}->{b_is}", a, w)
    gram = jnp.einsum(f"{a_is.replace('z', 'y')},{a_is}->{of['b']}yz", a, a)
    through = jnp.einsum(f"{of['b']}yz,{b_is}->{b_is.replace('z', 'y')}", gram, b)
    extra = jnp.sum((2 * cross + through) * b, axis=len(of["b"]))
    stored = "".join(x for x in letters if x not in of["i"])
    extra = jnp.einsum(f"{of['b']}{of['o']}->{stored}", extra)
    return column_norm(w, leaf.axes, jnp.expand_dims(extra, at(leaf.axes, "i")))
