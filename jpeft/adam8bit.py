"""Adam with both moments in 8 bits: two bytes a parameter in place of eight."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from jpeft.dynamic_map import decode, dynamic_map, encode
from jpeft.paths import path_string

# Paths of parameters whose first axis is the layers'.
STACKED = r"(^|/)(layers?|blocks?)/(?!\d)"


class Adam8bitState(NamedTuple):
    """How many steps were taken, and the moments, in trees like the parameters'.

    **Attributes:** `count`; `mu` and `nu`, the codes of both moments, uint8 in the parameter's
    shape, or fp32 moments for small parameters; `mu_scales` and `nu_scales`, fp32, the largest
    magnitude of every block, None for small parameters.
    """

    count: Int[Array, ""] | Any  # type: ignore[assignment]
    mu: Any
    nu: Any
    mu_scales: Any
    nu_scales: Any


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    block: int = 256,
    smallest: int = 4096,
    shards: int = 1,
    stacked: str = STACKED,
) -> optax.GradientTransformation:
    """Adam's rescaling of gradients, with moments that are 8-bit codes between steps.

    In each step a parameter's moments are made fp32 numbers, updated, and coded again: the first in
    the signed dynamic map, the second in the unsigned one, both relative to the largest magnitude
    of their block. A block is up to `block` numbers in a row along the parameter's largest axis
    (the last of several); codes have the parameter's shape, and are sharded as it is. Of layers
    that are stacked, one at a time has fp32 moments. Updates are fp32, whatever the gradients are.

    **Arguments:**

    - `block`, the numbers of a block.
    - `smallest`, parameters of fewer elements keep fp32 moments, and scalars do.
    - `shards`, how many devices an axis may be split over (those of a mesh's axes `fsdp` and
      `tensor`): blocks end where a device's part ends, so that nothing is gathered.
    - `stacked`, a pattern of paths whose first axis is the layers', as `sharding.Zero`'s.

    **Raises:** `ValueError` for a block, or shards, below 1.

    Source: Dettmers et al. 2022, section 2, without the stable embedding layer, which is a model's;
    second moments that are not zero never become zero, which is Li et al. 2023's, section 4.1.
    """
    layout = Layout(block, shards)

    def layers(path: Any, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and re.search(stacked, path_string(path)) is not None

    def init(params: Any) -> Adam8bitState:
        def zeros(path: Any, p: Any) -> tuple[Any, ...]:
            if p.size < max(smallest, 1) or not p.ndim:
                return jnp.zeros(p.shape, jnp.float32), jnp.zeros(p.shape, jnp.float32), None, None
            split = layers(path, p.shape)
            zero = jnp.zeros(p.shape[1:] if split else p.shape, jnp.float32)
            (m, m_scale), (v, v_scale) = (quantised(zero, s, layout) for s in (True, False))

            def whole(x: Any) -> Any:
                return jnp.broadcast_to(x, (p.shape[0], *x.shape)) if split else x

            # No array twice, for steps that donate their state.
            return whole(m), whole(v), whole(m_scale), jnp.copy(whole(v_scale))

        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        parts = _unzipped(structure, [zeros(*each) for each in leaves], 4)
        return Adam8bitState(jnp.zeros((), jnp.int32), *parts)

    def update(grads: Any, state: Adam8bitState, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params
        count = optax.safe_increment(state.count)
        steps = jnp.asarray(count, jnp.float32)
        correction = 1 - b1**steps, 1 - b2**steps

        def moved(g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * jnp.square(g)
            return (m / correction[0]) / (jnp.sqrt(v / correction[1]) + eps), m, v

        def coded(g: Any, m: Any, v: Any, m_scale: Any, v_scale: Any) -> tuple[Any, ...]:
            wide = dequantised(m, m_scale, True, layout), dequantised(v, v_scale, False, layout)
            step, m, v = moved(g, *wide)
            m, m_scale = quantised(m, True, layout)
            v, v_scale = quantised(v, False, layout)
            return step, m, v, m_scale, v_scale

        def of(path: Any, g: Any, *state: Any) -> tuple[Any, ...]:
            g = g.astype(jnp.float32)
            if state[2] is None:
                return (*moved(g, *state[:2]), None, None)
            if layers(path, g.shape):
                return _layer_by_layer(coded, (g, *state))
            return coded(g, *state)

        leaves, structure = jax.tree_util.tree_flatten_with_path(grads)
        own = zip(*(structure.flatten_up_to(tree) for tree in state[1:]), strict=True)
        results = [of(*path_and_g, *each) for path_and_g, each in zip(leaves, own, strict=True)]
        updates, *new = _unzipped(structure, results, 5)
        return updates, Adam8bitState(count, *new)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    block: int = 256,
    smallest: int = 4096,
    shards: int = 1,
    stacked: str = STACKED,
) -> optax.GradientTransformation:
    """AdamW with 8-bit moments: `optax.adamw` with `scale_by_adam8bit` in place of its Adam.

    **Arguments:** `mask`, which parameters decay, as optax's; the others as `scale_by_adam8bit`'s.
    """
    return optax.chain(
        scale_by_adam8bit(
            b1, b2, eps, block=block, smallest=smallest, shards=shards, stacked=stacked
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array is cut into blocks: along its largest axis, of several the last.

    **Attributes:** `block`, the most numbers of a block; `shards`, equal parts of the axis whose
    borders no block crosses. An axis that they do not divide, or that has fewer than 32 numbers for
    each, is one part: scales would outgrow codes.
    """

    block: int = 256
    shards: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.shards < 1:
            raise ValueError(f"blocks and shards are 1 or more: {self}")

    def of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The axis, its equal parts, and the numbers of a block; a part's last has less."""
        axis = max(range(len(shape)), key=lambda i: (shape[i], i))
        n = shape[axis]
        parts = self.shards if n % self.shards == 0 and n >= 32 * self.shards else 1
        return axis, parts, min(self.block, n // parts)


def quantised(
    x: Float[Array, "*shape"], signed: bool, layout: Layout
) -> tuple[UInt8[Array, "*shape"], Float[Array, "*blocks"]]:
    """The codes of numbers, and the largest magnitude of each block.

    Without signs, what is above zero is never coded as zero: a second moment of zero that belongs
    to a first one above zero makes steps many times too long (Li et al. 2023, section 4.1).

    Scales have the array's shape, but for as many numbers as there are blocks along their axis.
    """
    axis, parts, size = layout.of(x.shape)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    part = x.shape[axis] // parts
    rows = x.reshape(*before, parts, part, *after)
    rows = jnp.pad(rows, [(0, -part % size if i == axis + 1 else 0) for i in range(rows.ndim)])
    blocks = rows.reshape(*before, -1, size, *after)
    # A largest magnitude may pass over what is no number, but not over infinity.
    scales = jnp.max(jnp.where(jnp.isnan(blocks), jnp.inf, jnp.abs(blocks)), axis=axis + 1)
    # Of a block of zeros, zeros.
    divisor = jnp.expand_dims(jnp.where(scales == 0, 1, scales), axis + 1)
    codes = encode(blocks / divisor, dynamic_map(signed))
    if not signed:
        codes = jnp.where((blocks > 0) & (codes == 0), jnp.uint8(1), codes)
    codes = codes.reshape(rows.shape)
    return jax.lax.slice_in_dim(codes, 0, part, axis=axis + 1).reshape(x.shape), scales


def dequantised(
    codes: UInt8[Array, "*shape"], scales: Float[Array, "*blocks"], signed: bool, layout: Layout
) -> Float[Array, "*shape"]:
    """The fp32 numbers that codes and scales of `quantised` stand for."""
    axis, parts, size = layout.of(codes.shape)
    part = codes.shape[axis] // parts
    each = jnp.repeat(scales, size, axis=axis)
    each = each.reshape(*codes.shape[:axis], parts, -1, *codes.shape[axis + 1 :])
    each = jax.lax.slice_in_dim(each, 0, part, axis=axis + 1).reshape(codes.shape)
    return decode(codes, dynamic_map(signed)) * each


def _layer_by_layer(step: Callable[..., Any], arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """`step` of each index of the first axis, whose results take its arguments' places."""

    def body(i: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        here = [jax.lax.dynamic_index_in_dim(a, i, keepdims=False) for a in arrays]
        pairs = zip(arrays, step(*here), strict=True)
        return tuple(jax.lax.dynamic_update_index_in_dim(a, x, i, 0) for a, x in pairs)

    return jax.lax.fori_loop(0, arrays[0].shape[0], body, arrays)


def _unzipped(structure: Any, results: list[tuple[Any, ...]], n: int) -> list[Any]:
    """`n` trees from the tuples of their leaves."""
    return [jax.tree.unflatten(structure, [each[i] for each in results]) for i in range(n)]
