"""How long a step takes at least, if nothing stands in its way: an estimate, not a measurement.

The longest of three times: products at the chip's peak rate, memory traffic at its bandwidth, and
collectives at that of the links. It takes for granted that the three run at the same time, that
nothing waits, and that each runs at its full rate; real steps take longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sharding.chips import Chip
from sharding.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device: `compute`, `memory`, `wires`."""

    compute: float
    memory: float
    wires: float

    @property
    def seconds(self) -> float:
        """Of the slowest."""
        return max(self.compute, self.memory, self.wires)

    @property
    def bound(self) -> str:
        """Which is the slowest: `compute`, `memory` or `wires`."""
        return max(("compute", "memory", "wires"), key=lambda name: getattr(self, name))


def roofline(
    chip: Chip, mesh: Mesh, flops: float, traffic: float, found: Iterable[Collective]
) -> Roofline:
    """The estimate for one device's flops, bytes of memory traffic, and collectives."""
    wires = 0.0
    for c in found:
        if c.group > 1:
            wires += c.times * c.wire / _speed(chip, mesh, c)
    return Roofline(
        flops / (chip.flops / chip.devices), traffic / (chip.bandwidth / chip.devices), wires
    )


def _speed(chip: Chip, mesh: Mesh, c: Collective) -> float:
    """Bytes a second that one device can send in a collective.

    A permutation goes to one neighbour. Others use all links along the torus axes over which their
    groups stretch: both directions where the axis is a ring, one where it is a line.
    """
    if c.kind == "collective-permute":
        return chip.link / chip.devices
    return group_bandwidth(chip, mesh, c.group)


def group_bandwidth(chip: Chip, mesh: Mesh, size: int) -> float:
    """Bytes a second that one device sends in a collective over groups of `size` devices: those
    along mesh axes whose sizes make that number; of several such groups, the slowest ones.
    """
    named = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    speeds = [
        _along(chip, mesh, axes)
        for n in range(1, len(named) + 1)
        for axes in itertools.combinations(named, n)
        if math.prod(mesh.shape[a] for a in axes) == size
    ]
    return min(speeds, default=_along(chip, mesh, tuple(named)))


def _along(chip: Chip, mesh: Mesh, axes: tuple[Any, ...]) -> float:
    picked = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = list(np.asarray(mesh.devices[picked], object).reshape(-1))
    everyone = list(mesh.devices.reshape(-1))
    if len({getattr(d, "slice_index", 0) for d in group}) > 1:
        return chip.network / chip.devices
    if getattr(group[0], "platform", "") == "gpu" or not hasattr(group[0], "coords"):
        hosts = len({d.process_index for d in group})
        # Rings go through every card's own network port, as NCCL lays them.
        return min(chip.link, chip.network * len(group) / hosts) if hosts > 1 else chip.link
    extents = _extents(group)
    whole = _extents([d for d in everyone if _slice(d) == _slice(group[0])])
    total = 0.0
    for extent, full in zip(extents, whole, strict=True):
        if extent > 1:
            total += chip.link * (2 if extent == full and _is_ring(chip, extent, whole) else 1)
    # The cores of one chip share its links; a group within one chip does not need them.
    return total / chip.devices if total else chip.bandwidth / chip.devices


def _slice(device: Any) -> Any:
    return getattr(device, "slice_index", 0)


def _extents(devices: list[Any]) -> list[int]:
    return [len(set(column)) for column in zip(*(d.coords for d in devices), strict=True)]


def _is_ring(chip: Chip, extent: int, whole: list[int]) -> bool:
    if chip.ring == 4:
        return all(n % 4 == 0 for n in whole)
    return extent == chip.ring
