"""Random subspaces: every matched parameter moves by a projection of one small vector."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jpeft.kernels import fold
from jpeft.leaf import Leaf, dense, register, wide
from jpeft.paths import TargetError, flatten, match, replace
from jpeft.transform import Params, Trainable, Transform
from jpeft.uses import Uses

Projection = Literal["fastfood", "dense", "sparse"]
Scaling = Literal["none", "layer", "tensor"]
TOGETHER = 1 << 20  # numbers that are made in one piece


@register
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What a subspace trains.

    **Attributes:** `theta`, fp32 `(d - m,)`, where in the subspace the model stands; `scales`,
    fp32 `(m,)`, one for each layer or tensor (SAID), None without (DID).
    """

    theta: Any
    scales: Any


@dataclasses.dataclass(frozen=True)
class Subspace(Transform):
    """`theta = theta0 + P theta_d`, for all matched parameters together.

    With `scales` the i-th layer moves by `lambda_i (P theta_d)_i`, and its `lambda_i`, which starts
    at one, is trained as well: `d` counts them, so that `d - m` numbers are left for `theta_d`.

    `P` is never stored: it is made again from `seed` wherever it is needed. Its columns, over all
    matched parameters together, have unit norm in expectation.

    **Arguments:**

    - `d`: how many numbers are trained.
    - `targets`: patterns of the parameters that move; everything by default.
    - `projection`: `fastfood` (Le et al. 2013: Hadamard, Gaussian, permutation and signs; O(D log
      d)), `dense` (Gaussian; O(D d) work and memory, for small models), or `sparse` (very sparse:
      each row has about sqrt(D) / D of its entries, at least one; Li et al. 2006).
    - `scales`: `none` is DID, `layer` is SAID, `tensor` one scale for every parameter.
    - `seed`: of `P`.
    - `stacked`: a pattern of the paths whose first axis counts layers; `numbered`: one of the paths
      that hold a layer's number. What is in neither is a layer by its parent's name.

    Source: Li et al. 2018; Aghajanyan et al. 2021, section 3.
    """

    d: int
    targets: str | Sequence[str] = r".*"
    projection: Projection = "fastfood"
    scales: Scaling = "none"
    seed: int = 0
    stacked: str = r"(^|/)(layers?|blocks?)/(?!\d)"
    numbered: str = r"^(.*?(layers?|blocks?|h)[/_]\d+)(/|$)"

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ValueError(f"a subspace has at least 1 dimension, got {self.d}")

    def __hash__(self) -> int:
        return hash(repr(self))

    def init(self, key: PRNGKeyArray, params: Params, *, uses: Uses | None = None) -> Trainable:
        """`{"subspace": Coordinates}`: `theta` zero, `scales` one."""
        del key, uses
        leaves = flatten(params)
        chosen = self._chosen(leaves)
        total = sum(math.prod(leaves[p].shape) for p in chosen)
        if self.d > total:
            raise TargetError(
                f"a subspace of {self.d:,} dimensions is larger than the {total:,} parameters that "
                "it moves"
            )
        m = self._layers(leaves, chosen)[1]
        if self.d <= m:
            raise TargetError(
                f"d={self.d} leaves nothing beside the {m} scales (one a {self.scales}): choose a "
                "larger d, or a subspace without scales"
            )
        return {"subspace": Coordinates(jnp.zeros(self.d - m), jnp.ones(m) if m else None)}

    def place(
        self, params: Params, trainable: Trainable, key: PRNGKeyArray | None = None
    ) -> Params:
        """The parameters, moved: ordinary arrays of their own types."""
        del key
        at = trainable.get("subspace") if isinstance(trainable, Mapping) else None
        if not isinstance(at, Coordinates):
            raise TargetError("the trained state has no coordinates: it is of another method")
        leaves = flatten(params)
        chosen = self._chosen(leaves)
        places, m = self._layers(leaves, chosen)
        found = (at.theta.shape[0], 0 if at.scales is None else at.scales.shape[0])
        if found != (self.d - m, m):
            raise TargetError(
                f"the trained state has {found[0]} coordinates and {found[1]} scales; on these "
                f"parameters there are {self.d - m} and {m}"
            )
        sizes = {p: math.prod(leaves[p].shape) for p in chosen}
        steps = self.project(at.theta, sizes)
        moved: dict[str, Array] = {}
        for path in chosen:
            base = dense(leaves[path])
            step = (steps[path] * math.sqrt(1 / sum(sizes.values()))).reshape(base.shape)
            if at.scales is not None:
                scale = at.scales[jnp.asarray(places[path])]
                step = (
                    step * scale.reshape(-1, *[1] * (base.ndim - 1)) if scale.ndim else step * scale
                )
            moved[path] = (base.astype(wide(base.dtype)) + step).astype(base.dtype)
        return replace(params, moved)

    def clash(self, other: Transform) -> str | None:
        """With one seed two subspaces have the same directions."""
        if isinstance(other, Subspace) and other.seed == self.seed:
            return "with one seed they have the same directions: give one another seed"
        return None

    def project(
        self, theta: Float[Array, " d"], sizes: Mapping[str, int]
    ) -> dict[str, Float[Array, " n"]]:
        """`P theta` at each parameter, times the root of the number of all parameters: each number
        has the variance of `theta`'s squared norm.

        **Arguments:** `sizes`, of the parameters that move, by path.
        """
        key = jax.random.key(self.seed)
        if self.projection == "fastfood":
            return _fastfood(key, theta, sizes)
        one = _dense if self.projection == "dense" else _sparse
        return {path: one(fold(key, path), theta, size) for path, size in sizes.items()}

    def _chosen(self, leaves: Mapping[str, Any]) -> list[str]:
        chosen = match(self.targets, leaves)
        for path in chosen:
            if isinstance(leaves[path], Leaf):
                raise TargetError(
                    f"'{path}' was already rewritten ({type(leaves[path]).__name__}): put Subspace "
                    "before the method that rewrites it, or restrict its targets"
                )
        return [p for p in chosen if jnp.issubdtype(leaves[p].dtype, jnp.floating)]

    def _layers(
        self, leaves: Mapping[str, Any], chosen: Sequence[str]
    ) -> tuple[dict[str, int | list[int]], int]:
        """The number of every parameter's scale (a list along a stacked first axis); how many."""
        numbers: dict[str, int] = {}

        def of(name: str) -> int:
            return numbers.setdefault(name, len(numbers))

        if self.scales == "none":
            return {}, 0
        places: dict[str, int | list[int]] = {}
        for path in chosen:
            stack = re.search(self.stacked, path)
            count = leaves[path].shape[0] if stack and leaves[path].ndim else 0
            name = path
            if self.scales == "layer":
                number = re.search(self.numbered, path)
                name = number[1] if number else path[: stack.end()] if stack else _parent(path)
            places[path] = [of(f"{name}#{i}") for i in range(count)] if count else of(name)
        return places, len(numbers)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def hadamard(x: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    """The unnormalised Walsh-Hadamard transform along the last axis, a power of two long.

    In radix up to 16: products with small Hadamard matrices, few passes over the memory.
    """
    shape, k = x.shape, x.shape[-1]
    done = 1
    while done < k:
        radix = min(16, k // done)
        small = jnp.ones((1, 1), x.dtype)
        while small.shape[0] < radix:
            small = jnp.block([[small, small], [small, -small]])
        x = x.reshape(*shape[:-1], -1, radix, done)
        x = jnp.einsum("rs,...sd->...rd", small, x).reshape(shape)
        done *= radix
    return x


def _fastfood(key: Any, theta: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Blocks of `H G Pi H B`, one below the other, over all parameters together.

    The blocks share `B` and `Pi`, so that `Pi H B theta` is computed once; their Gaussians differ,
    which alone makes their rows independent.
    """
    d = theta.shape[0]
    k = 1 << max(0, d - 1).bit_length()
    signs, order, gauss = jax.random.split(key, 3)
    b = jax.random.rademacher(signs, (k,), theta.dtype)
    mixed = jax.random.permutation(order, hadamard(b * jnp.pad(theta, (0, k - d))))
    seed = jax.random.bits(gauss, (), jnp.uint32)
    blocks: dict[str, range] = {}
    first = 0
    for path, size in sizes.items():
        blocks[path] = range(first, first + -(-size // k))
        first = blocks[path].stop
    out: dict[str, Any] = {}
    for paths in _together(blocks, k):
        made, at = _blocks(seed, mixed, _numbers([blocks[p] for p in paths])), 0
        for path in paths:
            end = at + len(blocks[path])
            out[path] = made[at:end].reshape(-1)[: sizes[path]]
            at = end
    return {path: out[path] for path in sizes}


def _together(blocks: Mapping[str, range], k: int) -> list[list[str]]:
    """Which parameters' blocks are made in one piece: many small ones would be a program each, and
    large ones in one piece would all be in memory at once.
    """
    alone: list[list[str]] = []
    shared: list[list[str]] = []
    room = 0
    for path, numbers in blocks.items():
        need = len(numbers) * k
        if need > TOGETHER // 4:
            alone.append([path])
            continue
        if need > room:
            shared.append([])
            room = TOGETHER
        shared[-1].append(path)
        room -= need
    return alone + shared


def _numbers(blocks: Sequence[range]) -> Any:
    """Modulo 2^32. A long range is counted by the program, and no constant of it."""
    if len(blocks) == 1:
        first = jnp.uint32(blocks[0].start % 2**32)
        return first + jax.lax.iota(jnp.uint32, len(blocks[0]))
    return np.concatenate(blocks).astype(np.uint32)


@jax.checkpoint
def _blocks(seed: Any, mixed: Any, numbers: Any) -> Any:
    """Some blocks' rows, `(n, k)`. The gradient makes `G` again: it is not kept."""
    g = _normal(seed, numbers, mixed.shape[0])
    return hadamard(mixed * g) * jax.lax.rsqrt(jnp.sum(g * g, axis=1, keepdims=True))


def _normal(seed: Any, numbers: Any, columns: int) -> Float[Array, "n k"]:
    """The Gaussians of some blocks, the same on every device and in every version: hashed counters,
    through the normal's inverse distribution. JAX's own generator costs several times the rest of a
    projection.
    """
    x = jax.lax.broadcasted_iota(jnp.uint32, (len(numbers), columns), 1)
    x = x + numbers[:, None] * jnp.uint32(columns)
    x = x * jnp.uint32(0x9E3779B9) + seed
    # The finaliser of MurmurHash3 (Appleby), in which every bit of the input moves every other.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = x ^ (x >> 16)
    between = (x >> 8).astype(jnp.float32) * 2.0**-23 + (2.0**-24 - 1)  # inside (-1, 1)
    return math.sqrt(2) * jax.lax.erf_inv(between)


def _dense(key: Any, theta: Any, size: int) -> Any:
    return jax.random.normal(key, (size, theta.shape[0])) @ theta


def _sparse(key: Any, theta: Any, size: int) -> Any:
    """Rows with `s` entries of +-1 at random places, `s` about `d / sqrt(D)` and at least one."""
    d = theta.shape[0]
    s = max(1, round(d / math.sqrt(size)))
    where, sign = jax.random.split(key)
    places = jax.random.randint(where, (size, s), 0, d)
    signs = jax.random.rademacher(sign, (size, s), theta.dtype)
    return jnp.sum(theta[places] * signs, axis=1) * math.sqrt(d / s)
