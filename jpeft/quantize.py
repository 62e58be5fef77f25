"""Quantising a model's weights: 4 bits (NF4, FP4) or 8, in place of the arrays of the tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jpeft import nibbles
from jpeft.kernels import kernel_axes, leading
from jpeft.leaf import Leaf, dense, is_leaf
from jpeft.paths import TargetError, by_pattern, flatten, match, replace
from jpeft.quantized import Quantized
from jpeft.scales import doubled
from jpeft.transform import Params
from jpeft.uses import Uses

Format = Literal["nf4", "fp4", "int8"]
_NONE: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Parameters with the matched weights in 4 or 8 bits, to be frozen under any transform.

    `base = Quantize(r"proj/kernel$")(params, uses=uses)` is a tree like `params`; transforms take
    it as they take `params`: LoRA on it is QLoRA. Blocks run along a weight's inputs. Scales are
    computed in fp32, and every stacked layer has its own.

    **Arguments:**

    - `targets`: regular expressions, searched in `/`-joined paths; each must match a parameter.
    - `format`: `nf4`, `fp4`, or `int8`: one scale for each output, codes from -127 to 127.
    - `block`: how many numbers share a scale, in 4 bits.
    - `double`: keep the scales of 4 bits in 8 bits (double quantisation).
    - `axes`: pattern to letters, one for each axis of the parameter (`i`, `o`, `b`), where neither
      its shape nor `uses` tells; `{r"query/kernel$": "ioo"}`.
    - `outliers`: in `int8`, above 0 for LLM.int8(): activations are rounded to 8 bits too, but for
      so many of their columns that have the largest magnitudes (of 6 or more).

    **Raises:** `ValueError` for a format that there is not, or an odd block.

    Source: Dettmers et al. 2023, section 3.
    """

    targets: str | Sequence[str]
    format: Format = "nf4"
    block: int = 64
    double: bool = True
    axes: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.format not in ("nf4", "fp4", "int8"):
            raise ValueError(f"there are the formats nf4, fp4 and int8; got '{self.format}'")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"a block has an even number of elements; got {self.block}")
        if self.outliers < 0 or (self.outliers and self.format != "int8"):
            raise ValueError(
                f"outliers={self.outliers}: columns of activations that int8 leaves as they are, 0 "
                f"or more; the format is {self.format}"
            )

    def __hash__(self) -> int:
        return hash(repr(self))

    def __call__(self, params: Params, *, uses: Uses | None = None) -> Params:
        """The tree with a `Quantized` leaf at every matched path.

        **Arguments:** `params`, arrays, or their shapes under `jax.eval_shape`; `uses`, what
        `jpeft.uses` found, needed where a parameter's shape does not tell its axes.

        **Raises:** `TargetError` for a pattern that matches nothing, or a parameter that is no
        kernel of real numbers.
        """
        leaves = flatten(params)
        chosen = self.chosen(leaves)
        return replace(params, {p: self.leaf(p, leaves[p], uses) for p in chosen})

    def chosen(self, paths: Any) -> list[str]:
        """The matched paths. **Raises:** `TargetError` for a pattern that matches nothing."""
        found = match(self.targets, paths)
        for pattern in self.axes:
            match(pattern, found)
        return found

    def leaf(self, path: str, weight: Any, uses: Uses | None = None) -> Quantized:
        """One weight, quantised; as `__call__`."""
        if isinstance(weight, Leaf):
            raise TargetError(
                f"'{path}' was already rewritten ({type(weight).__name__}): quantise first"
            )
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise TargetError(f"'{path}' is {weight.dtype}: only real numbers are quantised")
        letters = by_pattern(self.axes, path, "")
        axes, table = kernel_axes("Quantize", path, weight, letters, uses)
        if table:
            raise TargetError(
                f"'{path}' is a table of embeddings: looking up a row would make all of it dense; "
                "leave it out of the pattern"
            )
        inputs = [i for i, k in enumerate(axes) if k == "i"]
        blocked = max(inputs, key=lambda i: (weight.shape[i], i)) - weight.ndim
        return self.array(path, weight, leading(axes), blocked)

    def array(self, path: str, weight: Any, stacked: int, blocked: int) -> Quantized:
        """One weight whose first `stacked` axes count weights, in blocks along `blocked`."""
        about = (self.format, self.block, self.double, stacked, blocked)
        codes, scales = _quantised(weight, *about)
        return Quantized(
            codes,
            scales,
            self.format,
            0 if self.format == "int8" else self.block,
            weight.shape[blocked],
            blocked,
            weight.ndim - stacked,
            self.outliers,
            jnp.dtype(weight.dtype),
            path,
        )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _quantised(
    weight: Any, form: Format, block: int, double: bool, stacked: int, blocked: int
) -> tuple[Any, Any]:
    if stacked:  # one layer at a time: what is computed on the way is in fp32
        about = (form, block, double, stacked - 1, blocked)
        return jax.lax.map(lambda w: _quantised(w, *about), weight)
    wide = jnp.moveaxis(weight.astype(jnp.float32), blocked, -1)
    if form == "int8":
        scales = jnp.abs(wide).max(-1, keepdims=True) / 127
        # Half away from zero never arises to matter: codes are the nearest integers.
        codes = jnp.rint(wide / jnp.maximum(scales, 1e-38)).astype(jnp.int8)
        return jnp.moveaxis(codes, -1, blocked), jnp.moveaxis(scales, -1, blocked)
    wide = jnp.pad(wide, [*[(0, 0)] * (wide.ndim - 1), (0, -wide.shape[-1] % block)])
    blocks = wide.reshape(*wide.shape[:-1], -1, block)
    scales = jnp.abs(blocks).max(-1)
    # As bitsandbytes does: times the reciprocal, which rounds otherwise than a division.
    inverse = 1.0 / jnp.maximum(scales, 1e-38)
    codes = nibbles.nearest(jnp.clip(blocks * inverse[..., None], -1, 1), form)
    packed = nibbles.pack(codes, -1).reshape(*wide.shape[:-1], -1)
    scales = jnp.moveaxis(scales, -1, blocked)
    packed = jnp.moveaxis(packed, -1, blocked)
    return packed, doubled(scales, 0, blocked) if double else scales


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """How far a quantised weight is from the weight.

    **Attributes:** `absolute`, the mean of |w' - w|, in units of the weight's root mean square;
    `relative`, the mean of |w' - w| / |w|; `bits` a parameter, of codes and scales.
    """

    absolute: float
    relative: float
    bits: float


def quantization_error(params: Params, quantised: Params) -> dict[str, QuantizationError]:
    """By path, the error of every quantised leaf of a tree.

    **Arguments:** `params`, the tree as it was.
    """
    before = flatten(params)
    found: dict[str, QuantizationError] = {}
    for path, leaf in flatten(quantised).items():
        if isinstance(leaf, Quantized):
            w = dense(before[path]).astype(jnp.float32)
            off = jnp.abs(leaf.materialise().astype(jnp.float32) - w)
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))
            found[path] = QuantizationError(
                float(off.mean() / jnp.sqrt((w**2).mean())),
                float((off / (jnp.abs(w) + 1e-8)).mean()),
                8 * size / leaf.size,
            )
    return found


def dequantize(params: Params) -> Params:
    """The tree with every quantised weight as the dense array that it stands for."""
    return jax.tree.map(
        lambda x: x.materialise() if isinstance(x, Quantized) else x, params, is_leaf=is_leaf
    )
