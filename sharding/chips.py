"""What accelerators can do, by their makers' figures.

TPUs: Google Cloud's pages of each version (docs.cloud.google.com/tpu/docs), where a chip's
bandwidth between chips is of all its links and both directions; the memory that programs have is
what the compiler grants. GPUs: NVIDIA's data sheets, dense figures (without sparsity); links are
NVLink, or PCIe where cards have none to a switch; networks those of NVIDIA's own systems.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's figures.

    **Attributes:**

    - `flops`, the peak of bf16 products with fp32 sums, a second.
    - `hbm`, bytes of memory that programs have; `bandwidth`, bytes a second to and from it.
    - `link`, bytes a second of one link to a neighbour, in one direction; `links`, how many there
      are: two for each axis of a torus of TPUs, one for a GPU, to a switch.
    - `network`, bytes a second of one chip, in one direction, to other slices or hosts.
    - `ring`, along which axes of a slice the last chip is linked to the first: those of this size
      (16), or, with 4, all axes of slices made of cubes of 4 by 4 by 4; 0 where there are none.
    - `devices`, how many JAX devices it is.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    link: float
    links: int
    network: float
    ring: int = 0
    devices: int = 1


_V5E = Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 4, 3.125e9, ring=16)
_V5P = Chip("v5p", 459e12, 95.74 * GIB, 2765e9, 100e9, 6, 6.25e9, ring=4)
_V6E = Chip("v6e", 918e12, 31.25 * GIB, 1638e9, 100e9, 4, 12.5e9, ring=16)
_V7X = Chip("tpu7x", 2307e12, 189.5 * GIB, 7380e9, 100e9, 6, 12.5e9, ring=4, devices=2)
_A100 = Chip("A100 80GB", 312e12, 80e9, 2039e9, 300e9, 1, 25e9)
_A6000 = Chip("RTX A6000", 154.8e12, 48e9, 768e9, 32e9, 1, 12.5e9)
_L40S = Chip("L40S", 362e12, 48e9, 864e9, 32e9, 1, 12.5e9)
_H100 = Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9, 1, 50e9)
_H200 = Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9, 1, 50e9)
_B200 = Chip("B200", 2250e12, 180e9, 7700e9, 900e9, 1, 50e9)

# By the names of topologies; GPUs by those of the chips.
CHIPS: Mapping[str, Chip] = {
    **{c.name: c for c in (_V5E, _V5P, _V6E, _V7X)},
    "a100": _A100,
    "a6000": _A6000,
    "l40s": _L40S,
    "h100": _H100,
    "h200": _H200,
    "b200": _B200,
}
_KINDS: Mapping[str, Chip] = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA RTX A6000": _A6000,
    "NVIDIA L40S": _L40S,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H200,
    "NVIDIA B200": _B200,
}


def chip_of(device_kind: str) -> Chip:
    """The chip of a JAX device's `device_kind`. **Raises:** `ValueError` for an unknown one."""
    if device_kind in _KINDS:
        return _KINDS[device_kind]
    near = difflib.get_close_matches(device_kind, _KINDS, 1)
    hint = f": did you mean '{near[0]}'?" if near else "."
    raise ValueError(
        f"the figures of a '{device_kind}' are not known{hint} There are those of "
        f"{', '.join(_KINDS)}"
    )
