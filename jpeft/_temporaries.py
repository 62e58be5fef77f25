"""What a training step holds beside its arguments where that is most, by kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jpeft._buffers import Compiler, Operand
from jpeft._flat import FUSED, Equation, Flat, bytes_of
from jpeft._liveness import Walk
from jpeft._split import Split, devices

TEMPORARIES = ("gradients", "activations", "gathered", "working")


@dataclasses.dataclass(frozen=True)
class Shared:
    """How arrays are shared: by so many devices, and which axes stay split where they are read."""

    shapes: tuple[tuple[int, ...], ...]
    by: tuple[int, ...]
    axes: tuple[Split, ...]

    @classmethod
    def of(cls, tree: Any, by: Sequence[int], axes: Sequence[Split]) -> Shared:
        shapes = tuple(tuple(x.shape) for x in jax.tree.leaves(tree))
        return cls(shapes, tuple(by), tuple(axes))

    def operands(self) -> list[Operand]:
        """As a loss reads them: what is shared by more devices than its axes is gathered."""
        return [
            Operand(sharded=n > devices(s), parameter=True, split=s)
            for n, s in zip(self.by, self.axes, strict=True)
        ]

    def updated(self) -> list[Operand]:
        """As an update reads them."""
        return [Operand(split=s) for s in self.axes]


def temporaries(
    step: Callable[..., Any],
    given: tuple[Any, ...],
    operands: Sequence[Operand],
    gradients: Shared,
    compiler: Compiler,
) -> dict[str, int]:
    """Bytes of the temporaries' kinds where most are in use; a step's last result is its loss."""
    flat = Flat(jax.make_jaxpr(step)(*given))
    middle = flat.put_last(flat.outs[-1])
    by = dict(zip(gradients.shapes, gradients.by, strict=True))
    axes = {x: devices(s) for x, s in zip(gradients.shapes, gradients.axes, strict=True)}

    def size(made_by: Equation | None, aval: Any, parts: int) -> int:
        # What has a trained array's shape is its gradient, or on the way to its update.
        summed = made_by is None or made_by.name in FUSED or made_by.name == "scan"
        known = (by if summed else axes).get(aval.shape, 1)
        return bytes_of(aval) // max(known, parts)

    rest = [Operand()] * (len(flat.ins) - len(operands))
    walk = Walk(flat, [*operands, *rest], size, compiler)
    peak = walk.peak()
    found: dict[str, int] = dict.fromkeys(TEMPORARIES, 0)
    for v, buffer in peak.buffers.items():
        # A narrow copy of a parameter is no activation.
        kept = middle if v in walk.maker else len(flat.equations)
        found[_kind(flat.avals[v].shape, buffer, kept, by)] += buffer.size
    found["gathered"] += peak.gathered
    # Less where results take over what they are made of.
    found["working"] = peak.total - sum(found[k] for k in TEMPORARIES[:-1])
    return found


def _kind(shape: Any, buffer: Any, middle: int, gradients: Mapping[Any, int]) -> str:
    if buffer.gathered:
        return "gathered"
    if buffer.made > middle and shape in gradients:
        return "gradients"
    return "activations" if buffer.made <= middle < buffer.last else "working"
