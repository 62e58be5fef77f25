"""The 4-bit weights of bitsandbytes' checkpoints, as transformers saves them.

For a weight `X.weight` there are its bytes, two codes in each; `X.weight.absmax`, the scales of its
blocks, in 8 bits where `X.weight.nested_absmax` and `X.weight.nested_quant_map` say how; the code
table, `X.weight.quant_map`; and the rest as JSON in `X.weight.quant_state.bitsandbytes__nf4` (or
`__fp4`). Blocks run along the flattened (out, in) matrix, neighbours share a byte, and the first
has the upper half of it. A block of ours runs along the inputs too, but a byte holds the codes `j`
and `j + block / 2`: so codes are moved, and every number stays what it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import nibbles
from jpeft._disk import listed
from jpeft.dynamic_map import dynamic_map
from jpeft.hf.files import CheckpointError, Tensors
from jpeft.quantize import Quantize
from jpeft.quantized import Quantized
from jpeft.scales import GROUP, Scales

logger = logging.getLogger("jpeft")
_STATE = ".quant_state.bitsandbytes__"
_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclasses.dataclass(frozen=True)
class Packed:
    """One weight of 4 bits in a file.

    **Attributes:** `name`, the tensor's; `format`, `nf4` or `fp4`; `shape`, (out, in); `block`, how
    many numbers share a scale; `group`, how many scales of 8 bits share one of theirs, 0 where
    scales are plain; `mean`, of those scales; `ours`, whether their codes stand for our map's
    numbers, in groups of our size.
    """

    name: str
    format: str
    shape: tuple[int, int]
    block: int
    group: int = 0
    mean: float = 0.0
    ours: bool = True

    @property
    def parts(self) -> list[str]:
        """The names of its tensors beside `name`."""
        nested = ("nested_absmax", "nested_quant_map") if self.group else ()
        own = [f"{self.name}.{p}" for p in ("absmax", "quant_map", *nested)]
        return [*own, f"{self.name}{_STATE}{self.format}"]

    @property
    def straddles(self) -> bool:
        """Whether a block has numbers of two rows: no block of ours does."""
        return self.shape[1] % self.block != 0

    @property
    def quantize(self) -> Quantize:
        """What makes a leaf of the same structure."""
        double = self.group > 0 and self.ours
        return Quantize(".", self.format, self.block, double)  # type: ignore[arg-type]


def find(tensors: Tensors) -> dict[str, Packed]:
    """A directory's 4-bit weights by name; empty where it has none.

    **Raises:** `CheckpointError` for weights of 8 bits, and with every incomplete weight.
    """
    names = tensors.names()
    eight = [n for n in names if n.endswith(".SCB")]
    if eight:
        raise CheckpointError(
            f"{tensors.directory} was quantised to 8 bits by bitsandbytes ({eight[0]} and "
            f"{len(eight) - 1} more): of its checkpoints those of 4 bits are read. Take the model "
            "before quantisation, and pass quantize=jpeft.Quantize(pattern, 'int8')"
        )
    found: dict[str, Packed] = {}
    problems: list[str] = []
    for state in (n for n in names if _STATE in n):
        name = state.partition(_STATE)[0]
        try:
            found[name] = _packed(tensors, name, state)
        except _PackedError as e:
            problems.append(str(e))
    if problems:
        what = f"{tensors.directory} has weights of bitsandbytes that cannot be read"
        raise CheckpointError(listed(what, problems))
    return found


def alike(packed: Sequence[Packed | None]) -> bool:
    """Whether layers can be stacked as codes: all quantised, in one way, in whole blocks a row."""
    first = packed[0]
    if first is None or any(p is None or p.straddles for p in packed):
        return False
    return len({p.quantize for p in packed if p is not None}) == 1


def tell_dense(directory: Any, packed: Sequence[Packed], dtype: Any) -> None:
    """Say which weights are made dense, and why."""
    first = packed[0]
    why = (
        f"its blocks of {first.block} do not end where rows of {first.shape[1]} do"
        if first.straddles
        else "its layers are quantised in different ways, or not all of them"
    )
    logger.warning(
        "%s: %d of the weights that bitsandbytes quantised are made dense, in %s, such as '%s': %s",
        directory,
        len(packed),
        dtype,
        first.name,
        why,
    )


def read(tensors: Tensors, packed: Packed, like: Quantized) -> Quantized:
    """A weight as a leaf with the same numbers.

    **Arguments:** `like`, the leaf as shapes.
    """
    out, n = packed.shape
    codes = _rearranged(_bytes(tensors, packed), (out, n), packed.block)
    rows = (out, n // packed.block)
    if packed.group and packed.ours:
        scales: Any = Scales(
            _kernel(tensors.read(f"{packed.name}.absmax"), rows),
            jnp.asarray(tensors.read(f"{packed.name}.nested_absmax").astype(np.float32)),
            jnp.float32(packed.mean),
        )
    else:
        scales = _kernel(_scales(tensors, packed), rows)
    return dataclasses.replace(like, codes=codes, scales=scales)


def read_dense(tensors: Tensors, packed: Packed, dtype: Any) -> jax.Array:
    """A weight as the dense (in, out) array that it stands for."""
    scales = _scales(tensors, packed)
    about = (packed.shape, packed.block, packed.format, dtype)
    return _dense(_bytes(tensors, packed), scales, *about)


class _PackedError(Exception):
    """What is wrong with one weight."""


def _packed(tensors: Tensors, name: str, state: str) -> Packed:
    form = state.partition(_STATE)[2]
    try:
        about: dict[str, Any] = json.loads(tensors.read(state).tobytes())
        shape = tuple(int(n) for n in about["shape"])
        block, group = int(about["blocksize"]), int(about.get("nested_blocksize") or 0)
        mean = float(about.get("nested_offset") or 0)
        kind = about["quant_type"]
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise _PackedError(f"damaged: {state} is no description of a weight ({e!r})") from e
    if form not in nibbles.TABLES or kind != form:
        raise _PackedError(f"unknown: {state} says '{kind}': there are nf4 and fp4")
    if len(shape) != 2 or min(shape) < 1:
        raise _PackedError(
            f"fused: {name} has the shape {shape}: weights of linear layers, (out, in), are read"
        )
    if block < 2 or block % 2 or group < 0:
        raise _PackedError(f"damaged: {state} has blocks of {block} numbers, in groups of {group}")
    packed = Packed(name, form, (shape[0], shape[1]), block, group, mean)
    missing = set(packed.parts) | {name}
    missing -= set(tensors.names())
    if missing:
        raise _PackedError(f"missing: {', '.join(sorted(missing))}")
    _check_sizes(tensors, packed)
    table = np.asarray(nibbles.TABLES[form], np.float32)
    if not np.array_equal(tensors.read(f"{name}.quant_map").astype(np.float32).ravel(), table):
        raise _PackedError(f"unknown: {name}.quant_map is not the table of {form}")
    same = group in (0, GROUP) and (
        not group
        or np.array_equal(tensors.read(f"{name}.nested_quant_map").ravel(), dynamic_map(True))
    )
    return dataclasses.replace(packed, ours=same)


def _check_sizes(tensors: Tensors, packed: Packed) -> None:
    n = math.prod(packed.shape)
    blocks = -(-n // packed.block)
    want = {"": -(-n // 2), ".absmax": blocks}
    if packed.group:
        want |= {".nested_absmax": -(-blocks // packed.group), ".nested_quant_map": 256}
        if tensors.kind(packed.name + ".absmax") != "U8":
            raise _PackedError(
                f"mistyped: {packed.name}.absmax is {tensors.kind(packed.name + '.absmax')}, not U8"
            )
    for part, size in want.items():
        name = packed.name + part
        # Codes may be stored as the bytes of another type (quant_storage).
        each = _BYTES.get(tensors.kind(name), 8) if not part else 1
        have = math.prod(tensors.shape(name)) * each
        if have != size:
            what = "bytes" if not part else "numbers"
            raise _PackedError(
                f"misshapen: {name} has {have} {what}, not the {size} of a weight of "
                f"{packed.shape} in blocks of {packed.block}"
            )


def _bytes(tensors: Tensors, packed: Packed) -> np.ndarray:
    return np.ascontiguousarray(tensors.read(packed.name)).reshape(-1).view(np.uint8)


def _scales(tensors: Tensors, packed: Packed) -> np.ndarray:
    """fp32, in the order of the blocks."""
    absmax = tensors.read(f"{packed.name}.absmax").reshape(-1)
    if not packed.group:
        return absmax.astype(np.float32)
    numbers = tensors.read(f"{packed.name}.nested_quant_map").astype(np.float32).reshape(-1)
    each = tensors.read(f"{packed.name}.nested_absmax").astype(np.float32).reshape(-1)
    scales = numbers[absmax] * np.repeat(each, packed.group)[: absmax.size]
    return scales + np.float32(packed.mean)


def _kernel(flat: np.ndarray, rows: tuple[int, int]) -> jax.Array:
    return jnp.asarray(flat.reshape(rows).T)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rearranged(raw: Any, shape: tuple[int, int], block: int) -> Any:
    out, n = shape
    codes = _unpacked(raw).reshape(out, n // block, block)
    return nibbles.pack(codes, -1).reshape(out, n // 2).T


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _dense(raw: Any, scales: Any, shape: tuple[int, int], block: int, form: str, dtype: Any) -> Any:
    n = math.prod(shape)
    numbers = nibbles.values(_unpacked(raw), form)[:n]
    numbers = jnp.pad(numbers, (0, -n % block)).reshape(-1, block) * scales[:, None]
    return numbers.reshape(-1)[:n].reshape(shape).T.astype(dtype)


def _unpacked(raw: Any) -> Any:
    return jnp.stack([raw >> 4, raw & 15], -1).reshape(-1)
