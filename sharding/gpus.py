"""GPUs that are not there, on one host or several: enough of them to compile for.

XLA compiles for a card from a description of it. Here these are made of NVIDIA's figures: the
tables of each compute capability in the CUDA C++ programming guide, the white papers of the
architectures for numbers of cores, and data sheets. What the compiler would try out on a card,
which kernel of several is the fastest for a product, it chooses by rules instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Generator, Mapping
from typing import Any

from sharding._first_line import first_line
from sharding._topology_error import TopologyError
from sharding.chips import CHIPS

GPU_EXAMPLES = "h100:1x8, h200:4x8, a6000:1x1"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a card beside its `Chip`.

    **Attributes:** `kind`, JAX's `device_kind`; `capability`, major and minor; `cores`, streaming
    multiprocessors; `lanes`, fp32 units of each; `shared`, KiB of shared memory of each; `threads`,
    at most on each; `cache`, MiB of the second level; `clock`, GHz, at most.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    shared: int
    threads: int
    cache: float
    clock: float


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 2048, 40, 1.41),
    "a6000": Gpu("NVIDIA RTX A6000", (8, 6), 84, 128, 100, 1536, 6, 1.80),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 128, 100, 1536, 96, 2.52),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 2048, 50, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228, 2048, 50, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 228, 2048, 126, 1.965),
}


def gpus(kind: str, shape: str) -> list[Any]:
    """The GPUs of some hosts, `shape` as `2x8`: see `sharding.topology`.

    **Raises:** `TopologyError` for another shape, or where JAX's CUDA plugin is not installed.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if found is None:
        raise TopologyError(
            f"'{kind}:{shape}' is no topology: after {kind} and a colon stands how many hosts have "
            f"how many GPUs each; examples: {GPU_EXAMPLES}"
        )
    import jax
    from jax.experimental import topologies

    text = description(kind)
    # Groups of hosts that NVLink joins, hosts of each, GPUs of each host.
    hosts = f"{found[1]}x1x{found[2]}"
    try:
        with unchecked():
            devices = topologies.get_topology_desc(
                f"{kind}:{shape}", "cuda", target_config=text, topology=hosts
            ).devices
    except NotImplementedError as e:
        raise TopologyError(
            "compiling for GPUs needs JAX's CUDA plugin, and no GPU: pip install "
            f"'jax-cuda12-plugin=={jax.__version__}', or 'jpeft[cuda]' with all of CUDA. Where it "
            "is installed without CUDA, set JAX_PLATFORMS=cpu"
        ) from e
    except Exception as e:  # of the compiler's, which are of many kinds
        raise TopologyError(
            f"the compiler makes no topology '{kind}:{shape}': {first_line(e)}"
        ) from e
    return list(devices)


def description(kind: str) -> str:
    """A card as XLA reads it, the text of a `stream_executor.GpuTargetConfigProto`."""
    gpu, chip = GPUS[kind], CHIPS[kind]
    major, minor = gpu.capability
    # From Hopper on, instructions of this very card: wgmma and what came after.
    own = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{gpu.kind}"
  cuda_compute_capability {{ major: {major} minor: {minor} {own} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {round(chip.hbm)}
  memory_bandwidth: {round(chip.bandwidth)}
  l2_cache_size: {round(gpu.cache * 2**20)}
  shared_memory_per_core: {gpu.shared * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {(gpu.shared - 1) * 2**10}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.kind}"
"""


@contextlib.contextmanager
def unchecked() -> Generator[None]:
    """While JAX takes up its CUDA plugin, without a look for CUDA's libraries: nothing runs."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(name)
    try:
        os.environ.setdefault(name, "1")
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
