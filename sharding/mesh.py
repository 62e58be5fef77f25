"""Meshes with named axes, from all devices or a shape; over slices and hosts, where some are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

# In order of how much passes along them a step: gradients, then weights, then activations.
AXES = ("data", "fsdp", "tensor")


def make_mesh(
    shape: str | Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`.

    The batch is split over `data` and `fsdp`; what a ZeRO stage shards is sharded over `fsdp` and
    repeated over `data`; layers are split over `tensor`. Over several TPU slices, or several hosts
    of GPUs, the outermost axes that can hold them run between them (over the slow network: DCN),
    and the inner ones within each (ICI, NVLink).

    **Arguments:** `shape`, sizes as `data=2,fsdp=4` or a mapping; -1 stands for the devices that
    are left, an axis that is not named has size 1, and without a shape all are on `fsdp`;
    `devices`, all of `jax.devices()` when left out.

    **Raises:** `ValueError` for an unknown axis, or sizes that do not make the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(shape, len(devices))
    groups = _granules(devices)
    if len(groups) == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(array, AXES)
    outer = _outer(sizes, len(groups))
    inner = [n // m for n, m in zip(sizes, outer, strict=True)]
    array = mesh_utils.create_hybrid_device_mesh(
        inner,
        outer,
        devices,
        process_is_granule=not _has_slices(devices),
        allow_split_physical_axes=True,
    )
    return Mesh(array, AXES)


def mesh_sizes(shape: str | Mapping[str, int] | None, devices: int) -> tuple[int, int, int]:
    """The sizes of `data`, `fsdp` and `tensor` on so many devices. **Raises:** `ValueError`."""
    if shape is None:
        shape = {"fsdp": devices}
    named = parsed_mesh(shape) if isinstance(shape, str) else dict(shape)
    for name, size in named.items():
        if name not in AXES:
            raise ValueError(f"the mesh has no axis '{name}': its axes are {', '.join(AXES)}")
        if size < 1 and size != -1:
            raise ValueError(f"the mesh axis {name}={size} must be 1 or more, or -1 for the rest")
    sizes = [named.get(name, 1) for name in AXES]
    free = sizes.count(-1)
    if free > 1:
        raise ValueError("only one mesh axis can be -1, the devices that are left")
    known = math.prod(n for n in sizes if n != -1)
    if devices % known or (not free and known != devices):
        written = ",".join(f"{k}={v}" for k, v in named.items())
        raise ValueError(f"the mesh {written} does not fit {devices} devices")
    data, fsdp, tensor = (devices // known if n == -1 else n for n in sizes)
    return data, fsdp, tensor


def parsed_mesh(text: str) -> dict[str, int]:
    """The axes of `data=2,fsdp=4`. **Raises:** `ValueError` for what is not written so."""
    out: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        try:
            number = int(size)
        except ValueError:
            equals = ""
            number = 0
        if not equals:
            raise ValueError(f"the mesh '{text}' is not like data=2,fsdp=4: '{part}' is no axis")
        if name in out:
            raise ValueError(f"the mesh '{text}' names {name} twice")
        out[name] = number
    return out


def _has_slices(devices: Sequence[Any]) -> bool:
    return len({getattr(d, "slice_index", None) for d in devices} - {None}) > 1


def _granules(devices: Sequence[Any]) -> list[Any]:
    """What the slow network is between: slices of TPUs, else hosts; one where there is none."""
    if _has_slices(devices):
        return sorted({d.slice_index for d in devices})
    if devices[0].platform == "tpu":
        return [0]  # hosts of one slice are joined by ICI
    return sorted({d.process_index for d in devices})


def _outer(sizes: Sequence[int], groups: int) -> list[int]:
    """How many groups each axis runs over, the outermost axis first."""
    left, out = groups, []
    for size in sizes:
        here = math.gcd(size, left)
        out.append(here)
        left //= here
    if left != 1:
        written = ",".join(f"{k}={v}" for k, v in zip(AXES, sizes, strict=True))
        raise ValueError(f"the mesh {written} cannot be laid over {groups} slices or hosts evenly")
    return out


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return int(np.prod([mesh.shape[name] for name in ("data", "fsdp")]))
