"""The scales of blocks, themselves in 8 bits: double quantisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.dynamic_map import decode, dynamic_map, encode
from jpeft.leaf import register, static

GROUP = 256


@register
@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales in the 8-bit dynamic map, by groups of 256, about their mean.

    A group is 256 scales of one weight, in the order of the weight's blocks as a (output, input)
    matrix is flattened, which is bitsandbytes' order. 8 bits and 32 / 256 for each block of 64:
    0.127 bits a parameter.

    **Attributes:** `codes`, uint8, of the scales' shape; `absmax`, fp32 `(*batch, groups)`; `mean`,
    fp32 `(*batch,)`; `blocked`, the axis along which the blocks of one row follow one another,
    counted from the end.

    Source: Dettmers et al. 2023, section 3.
    """

    codes: Any
    absmax: Any
    mean: Any
    blocked: int = static(-2)

    def full(self) -> Float[Array, ...]:
        """The scales, fp32."""
        batch = self.mean.ndim
        moved = jnp.moveaxis(self.codes, self.blocked, -1)
        n = math.prod(moved.shape[batch:])
        groups = jnp.repeat(self.absmax, GROUP, axis=-1)[..., :n].reshape(moved.shape)
        mean = self.mean.reshape(*self.mean.shape, *[1] * (moved.ndim - batch))
        scales = decode(moved, dynamic_map(signed=True)) * groups + mean
        return jnp.moveaxis(scales, -1, self.blocked)


def doubled(scales: Float[Array, ...], batch: int, blocked: int) -> Scales:
    """Scales in 8 bits.

    **Arguments:** `batch`, how many first axes count weights of their own; `blocked`, the axis
    along which the blocks of one row follow one another, counted from the end.
    """
    moved = jnp.moveaxis(scales, blocked, -1)
    outer = moved.shape[:batch]
    flat = moved.reshape(*outer, -1)
    mean = flat.mean(-1)
    rest = flat - mean[..., None]
    n = rest.shape[-1]
    padded = jnp.pad(rest, [*[(0, 0)] * batch, (0, -n % GROUP)])
    groups = padded.reshape(*outer, -1, GROUP)
    absmax = jnp.abs(groups).max(-1)
    # As bitsandbytes does: times the reciprocal, which rounds otherwise than a division.
    inverse = 1.0 / jnp.maximum(absmax, 1e-38)
    codes = encode(groups * inverse[..., None], dynamic_map(signed=True))
    codes = codes.reshape(*outer, -1)[..., :n].reshape(moved.shape)
    return Scales(jnp.moveaxis(codes, -1, blocked), absmax, mean, blocked)


def specs_of(scales: Any, spec: Sequence[Any], batch: int) -> Any:
    """A `PartitionSpec` for each array of scales, when the weight has `spec`."""
    from jax.sharding import PartitionSpec

    whole = PartitionSpec(*spec)
    if not isinstance(scales, Scales):
        return whole
    stacked = PartitionSpec(*spec[:batch])
    return dataclasses.replace(scales, codes=whole, absmax=stacked, mean=stacked)
