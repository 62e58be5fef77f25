"""Jobs of several processes: who the others are, and which rows each loads.

Nothing here runs at import: a command calls `initialise` before it touches a device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from sharding.waiting import told, wait_for_first

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How processes find one another.

    **Attributes:** `kind`, for people: `explicit`, `slurm`, `ompi`, `k8s` or `tpu`; `coordinator`,
    `processes`, `process`, None where JAX reads them from the environment itself; `device`, the
    only one of its host's GPUs that this process is to have, None for what JAX gives it.
    """

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    device: int | None = None


def detect(environ: Mapping[str, str], *, tpu: bool = False) -> Cluster | None:
    """Who started this process, from its environment; None where it is alone.

    In this order: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; SLURM's
    `srun`; Open MPI's `mpirun`; an indexed job of Kubernetes; a TPU host.

    **Arguments:** `tpu`, whether this machine has TPUs: then JAX asks for the rest of the slice,
    and of other slices.

    **Raises:** `ValueError` that names the variable which is missing or wrong.
    """
    explicit = [n for n in (COORDINATOR, PROCESSES, PROCESS) if n in environ]
    if PROCESSES in explicit or PROCESS in explicit:
        for name in (COORDINATOR, PROCESSES, PROCESS):
            if name not in environ:
                raise ValueError(f"{' and '.join(explicit)} set, but not {name}")
        processes, process = _number(environ, PROCESSES), _number(environ, PROCESS)
        return _explicit(environ[COORDINATOR], processes, process)
    if _number(environ, "SLURM_NTASKS", 1) > 1 and "SLURM_JOB_ID" in environ:
        for name in ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
            if name not in environ:
                raise ValueError(
                    f"SLURM_NTASKS is {environ['SLURM_NTASKS']}, but {name} is not set: start the "
                    "command by srun, or unset SLURM_NTASKS for one process"
                )
        return Cluster("slurm")
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return Cluster("ompi")
        # Open MPI 5 does not tell where its head is: the first process has to be named.
        if COORDINATOR not in environ:
            raise ValueError(
                f"Open MPI started {environ['OMPI_COMM_WORLD_SIZE']} processes and does not say "
                f"where the first one is: set {COORDINATOR} to its host:port (mpirun -x)"
            )
        size, rank, local = (
            _number(environ, f"OMPI_COMM_WORLD_{x}") for x in ("SIZE", "RANK", "LOCAL_RANK")
        )
        return _explicit(environ[COORDINATOR], size, rank, local)
    if tpu:
        return _tpu(environ)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster("k8s")
    return None


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    """A TPU host: alone, or one of a slice, or of several."""
    slices = _number(environ, "MEGASCALE_NUM_SLICES", 1)
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if slices > 1:
        for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_SLICE_ID"):
            if name not in environ:
                raise ValueError(f"MEGASCALE_NUM_SLICES is {slices}, but {name} is not set")
    elif hosts is None:
        # A machine of Compute Engine: its metadata server knows, where it may be asked.
        return None if "TPU_SKIP_MDS_QUERY" in environ else Cluster("tpu")
    elif "," not in hosts:
        return None
    if hosts is not None:
        worker, count = _number(environ, "TPU_WORKER_ID"), len(hosts.split(","))
        if not 0 <= worker < count:
            raise ValueError(f"TPU_WORKER_ID is {worker}, of {count} hosts: they count from 0")
    return Cluster("tpu")


def _explicit(
    coordinator: str, processes: int, process: int, device: int | None = None
) -> Cluster | None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{COORDINATOR} is '{coordinator}': it must be host:port")
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: they count from 0")
    if processes == 1:
        return None
    return Cluster("explicit", coordinator, processes, process, device)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"{name} is not set")
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is '{text}', which is no number") from None


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = 300,
) -> Cluster | None:
    """Join the other processes of this job; does nothing where there are none.

    Call it first: JAX cannot be told after it has found its devices.

    **Arguments:** `coordinator`, `processes` and `process`, all three, or none: then `detect` reads
    the environment; `timeout`, for how many seconds the others are waited for.

    **Raises:** `ValueError`, see `detect`; and for Kubernetes without its Python package;
    `TimeoutError` where the first process does not listen. Where others do not come JAX ends this
    process.
    """
    given = (coordinator, processes, process)
    if coordinator is not None and processes is not None and process is not None:
        found = _explicit(coordinator, processes, process)
    elif any(x is not None for x in given):
        raise ValueError("give coordinator, processes and process together, or none of them")
    else:
        found = detect(os.environ, tpu=_has_tpu())
    if found is None:
        return None
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's own preemption service takes SIGTERM from the start and keeps it to itself: a job that
    # is still loading would not stop. `stop_on_signals` takes it where there is something to save.
    jax.config.update("jax_enable_preemption_service", False)
    if found.kind == "k8s" and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            "an indexed job of Kubernetes is found by the package kubernetes: pip install "
            f"'jax[k8s]', or set {COORDINATOR}, {PROCESSES} and {PROCESS}"
        )
    seconds = math.ceil(timeout)
    if found.coordinator is not None and found.processes and found.process is not None:
        job = found.coordinator, found.processes, found.process
        with told(*job, timeout):
            if found.process:
                wait_for_first(*job, timeout)
            jax.distributed.initialize(
                *job, local_device_ids=found.device, initialization_timeout=seconds
            )
    else:
        # JAX knows Kubernetes and TPUs when it looks by itself; by name it finds only these two.
        method = found.kind if found.kind in ("slurm", "ompi") else None
        jax.distributed.initialize(cluster_detection_method=method, initialization_timeout=seconds)
    return found


def _has_tpu() -> bool:
    """Whether TPUs are plugged in, and JAX may use them."""
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu").split(","):
        return False
    # Virtual machines pass other devices on by vfio too: TPUs are no use without their library.
    library = "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None
    device = pathlib.Path("/dev")
    return library and any((*device.glob("accel[0-9]*"), *device.glob("vfio/[0-9]*")))


def is_main() -> bool:
    """Whether this is the process that writes reports.

    Asked of a process that is alone it starts no device.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def largest(number: int) -> int:
    """The largest of all processes' numbers; every process must ask at the same place."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.asarray(number, np.int32))))


def process_rows(rows: int, sharding: jax.sharding.Sharding) -> Int[np.ndarray, " n"]:
    """Which rows of a global batch of `rows` this process makes: those of its devices, ascending.

    Several processes make the same ones where a mesh splits layers over them.

    **Arguments:** `sharding`, `Zero.batch` of an array with so many rows.
    """
    found = sharding.addressable_devices_indices_map((rows,))
    assert found is not None  # there are devices here
    return np.unique(np.concatenate([np.arange(rows)[at] for at in found.values()]))


def global_batch(local: Any, sharding: Any, rows: int) -> Any:
    """Global arrays from the rows that each process has.

    **Arguments:** `local`, a tree of this process's rows, as `process_rows` numbers them, or of all
    rows; `sharding`, `Zero.batch` of the whole batch's shapes, or one sharding; `rows`, the whole
    batch's.

    **Raises:** `ValueError` for other numbers of rows.
    """
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, local)

    def one(x: Any, s: Any) -> Any:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(s, x, (rows, *x.shape[1:]))

    return jax.tree.map(one, local, sharding)


def measured(
    count: int, of: Callable[[Sequence[int]], Int[np.ndarray, "n k"]]
) -> Int[np.ndarray, "count k"]:
    """`of` the numbers below `count`, each process working out a share of them for all.

    Every process must ask at the same place, and have the same `of`.
    """
    processes = jax.process_count()
    own = range(jax.process_index(), count, processes)
    found = np.asarray(of(own), np.int32)
    if processes == 1 or not count:
        return found
    each = -(-count // processes)
    filled = np.zeros((each, *found.shape[1:]), np.int32)
    filled[: len(found)] = found
    every = multihost_utils.process_allgather(filled)
    return np.swapaxes(every, 0, 1).reshape(each * processes, *found.shape[1:])[:count]


def everywhere(host: Any, sharding: Any) -> Any:
    """Global arrays from what every process has whole: each device is given its part.

    **Arguments:** `host`, a tree of arrays, the same in every process; `sharding`, a tree of
    theirs.
    """

    def put(x: Any, s: Any) -> Any:
        if isinstance(x, jax.Array) and x.sharding == s:
            return x
        if s.is_fully_addressable:
            return jax.device_put(x, s)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(x, s)
        array = np.asarray(x)
        return jax.make_array_from_callback(array.shape, s, lambda index: array[index])

    return jax.tree.map(put, host, sharding)
