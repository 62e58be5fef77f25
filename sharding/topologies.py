"""The devices of machines that are not there, by name: enough of them to compile for."""

from __future__ import annotations

import difflib
from typing import Any

from sharding._topology_error import TopologyError as TopologyError
from sharding.chips import CHIPS
from sharding.gpus import GPU_EXAMPLES, GPUS, gpus
from sharding.tpus import TPU_EXAMPLES, tpus


def topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of a topology, for `sharding.make_mesh` and for compiling. They run nothing.

    **Arguments:** `name`, a kind of TPU and the shape of its slice, such as `v5e:16x16` or
    `v5p:4x4x4`, or a kind of GPU and how many hosts have how many each, such as `h100:2x8`;
    `slices`, how many of them, of TPUs, joined by the data-centre network.

    **Raises:** `TopologyError` where there is no such topology, or not its compiler: libtpu for
    TPUs, JAX's CUDA plugin for GPUs.
    """
    kind, _, shape = name.partition(":")
    kinds = [k for k, chip in CHIPS.items() if chip.name == k]
    if kind not in (*kinds, *GPUS):
        near = difflib.get_close_matches(kind, (*kinds, *GPUS), 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise TopologyError(
            f"'{name}' is no topology: {hint}The kinds of TPU are {', '.join(kinds)}; examples: "
            f"{TPU_EXAMPLES}. Those of GPU are {', '.join(GPUS)}; examples: {GPU_EXAMPLES}"
        )
    if slices < 1:
        raise TopologyError(f"slices counts slices, at least 1: {slices}")
    if kind in kinds:
        return tpus(kind, shape, slices)
    if slices > 1:
        raise TopologyError(
            f"slices are of TPUs: of GPUs the name says how many hosts there are, as in {kind}:"
            f"{slices}x8"
        )
    return gpus(kind, shape)
