"""Whether every process of a job was given the same arrays."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding.checkpoint_bits import named, plain


def check_agreement(host: Any, sharding: jax.sharding.Sharding) -> None:
    """Refuse what is not the same in every process: of each, devices would be given some parts.

    Every process must ask at the same place. It reads the arrays once, but for those that stand
    over several processes already.

    **Arguments:** `host`, a tree of arrays; `sharding`, of devices that it is for: where they are
    not of every process nothing is asked.

    **Raises:** `ValueError` in every process where one has other paths, shapes, types or numbers.
    """
    processes = {d.process_index for d in sharding.device_set}
    if jax.process_count() == 1 or len(processes) < jax.process_count():
        return
    found = 0
    for name, x in named(host).items():
        found = zlib.crc32(f"{name} {tuple(x.shape)} {x.dtype}".encode(), found)
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            array = np.ascontiguousarray(plain(x)).reshape(-1)
            found = zlib.crc32(array.view(np.uint8).data, found)
    every = multihost_utils.process_allgather(np.uint32(found))
    others = np.flatnonzero(every != every[0])
    if len(others):
        shown = ", ".join(map(str, others[:8]))
        raise ValueError(
            f"process 0 and others (of {len(every)}: {shown}) were given different arrays: all "
            "of them need the same, loaded from the same files or drawn from one seed"
        )
