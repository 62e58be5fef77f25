"""The devices of TPU slices that are not there: enough of them to compile for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sharding._first_line import first_line
from sharding._topology_error import TopologyError

TPU_EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:4x4x4"
# libtpu asks the cloud for the machine that it is on, and tells its standard error what it did not
# find. These are its answers where there is no TPU.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    # Without it one process at a time could compile: nobody has a TPU to be kept from others.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpus(kind: str, shape: str, slices: int) -> list[Any]:
    """The chips of `slices` slices of a shape such as `16x16`, see `sharding.topology`.

    **Raises:** `TopologyError` where there is no such slice, or no libtpu.
    """
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise TopologyError(
            f"'{kind}:{shape}' is no topology: after {kind} and a colon stands the slice's shape; "
            f"examples: {TPU_EXAMPLES}"
        )
    needs_libtpu()
    from jax.experimental import topologies

    more: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    try:
        with alone():
            return list(topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **more).devices)
    except Exception as e:  # libtpu's errors are JAX's runtime errors, of many kinds
        raise TopologyError(
            f"libtpu makes no topology '{kind}:{shape}': {first_line(e)}; examples: {TPU_EXAMPLES}"
        ) from e


def needs_libtpu() -> None:
    """**Raises:** `TopologyError` where the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "compiling for TPUs needs their compiler, libtpu: pip install 'jpeft[tpu]'"
        )


def mismatch() -> str:
    """What to say where a program compiles and cannot be read."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return (
        f"libtpu {found['libtpu']} compiled the program in a form that jax {found['jax']} cannot "
        f"read: install the libtpu of this jax with pip install 'jax[tpu]=={found['jax']}'"
    )


@contextmanager
def alone() -> Generator[None]:
    """libtpu's answers in the environment, while it is loaded, so that it does not complain to the
    terminal that there is no TPU; on a host that has some, nothing is changed.
    """
    here = any(pathlib.Path(p).exists() for p in ("/dev/accel0", "/dev/vfio/0"))
    before = {name: os.environ.get(name) for name in _ALONE}
    # JAX fills some of them with messages, of what it could not find out, when it is imported.
    missing = {n: v for n, v in before.items() if v is None or v.startswith("WARNING")}
    try:
        if not here:
            os.environ.update({name: _ALONE[name] for name in missing})
        yield
    finally:
        for name, value in missing.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
