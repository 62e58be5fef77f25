"""A training step compiled for TPUs and GPUs that are not there, and what its program says.

Only shapes are needed, with the shardings of `Step.abstract` and `Zero`: no weights are allocated.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from sharding._hlo import parse
from sharding.chips import Chip, chip_of
from sharding.costs import program_flops, traced_flops, traffic
from sharding.hlo import Collective, Total, by_kind, collectives
from sharding.offload import HOST, Offloaded
from sharding.roofline import Roofline, roofline
from sharding.step import State, Step
from sharding.topologies import TopologyError, topology
from sharding.tpus import mismatch

__all__ = [
    "GATHERS",
    "PLAIN",
    "Memory",
    "Report",
    "TopologyError",
    "compile_for",
    "options_for",
    "placed",
    "topology",
]

# Compiler options for TPUs without the interleaving of products with their operands' passing on,
# which turns gathers into many permutations: the program that theory speaks of.
PLAIN: Mapping[str, str] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Gathers over all three axes of a torus are, unless asked otherwise, sums of arrays that are zero
# but for a device's part: twice the bytes (pytorch/xla#6528 says which options ask, and why).
GATHERS: Mapping[str, str] = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    **Attributes:**

    - `arguments`, by kind: `trainable`, `frozen`, `optimiser`, `batch`, `other` (counters, keys),
      and `padding`, what the compiler's layouts add to them.
    - `outputs`, those that take no argument's place.
    - `temporaries`, what is alive beside these where the program needs most.
    - `code`, the program itself.
    - `limit`, what there is.
    - `host`, bytes in the host's memory, which the others leave out.
    """

    arguments: Mapping[str, int]
    outputs: int
    temporaries: int
    code: int
    limit: float
    host: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.arguments.values()) + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiled step says.

    **Attributes:**

    - `fits`, whether there is room for the program. Where there is not the compiler for TPUs makes
      none; that for GPUs makes one all the same.
    - `flops`, of the step's products over all devices, as it is written, with what is computed
      again; `flops_per_device`, of the compiled program's, so that what several devices compute
      alike shows.
    - `traffic`, bytes that a device reads from and writes to its memory.
    - `collectives`, each; `roofline`, an estimate of the step's time.
    - `text`, the compiled program; empty where there is none, and then so is what is read from it.
    - `seconds`, that tracing, lowering and compiling took.
    """

    chip: Chip
    mesh: Mesh
    memory: Memory
    fits: bool
    flops: float
    flops_per_device: float
    traffic: float
    collectives: list[Collective]
    roofline: Roofline | None
    seconds: Mapping[str, float]
    text: str = dataclasses.field(repr=False)

    @property
    def devices(self) -> int:
        """How many."""
        return self.mesh.size

    @property
    def by_kind(self) -> Mapping[str, Total]:
        """The collectives of one step by kind."""
        return by_kind(self.collectives)

    def utilisation(self, flops: float | None = None) -> float | None:
        """The part of the devices' peak that a step of the estimated time would use; None where
        there is no estimate. It is a bound from above.

        **Arguments:** `flops`, those that the model needs (MFU: Chowdhery et al. 2022, appendix B);
        without it all that the step computes (HFU).
        """
        if self.roofline is None or not self.roofline.seconds:
            return None
        peak = self.devices * self.chip.flops / self.chip.devices
        return (self.flops if flops is None else flops) / (peak * self.roofline.seconds)


def compile_for(
    step: Step,
    state: State,
    frozen: Any,
    batch: Any,
    key: Any = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compile a step for the devices of its mesh, and read its program.

    **Arguments:** `step`, with a `zero` whose mesh is of `topology`'s devices, or of others;
    `state`, `frozen`, `batch`, `key`, as the step's, of `jax.ShapeDtypeStruct`s with shardings
    (`Step.abstract`, `placed`); `options`, of the compiler, such as `options_for` gives.

    **Raises:** `TopologyError` where the compiler does not match JAX, or for an optimiser that is
    offloaded from GPUs that are not here; `ValueError` for a step without a mesh, or devices whose
    figures are not known.
    """
    if step.zero is None:
        raise ValueError("the step has no mesh to be compiled for: make_step(..., zero=Zero(mesh))")
    mesh = step.zero.mesh
    device = mesh.devices.flat[0]
    chip, gpu = chip_of(device.device_kind), device.platform == "gpu"
    if gpu and isinstance(step.optimiser, Offloaded) and not device.addressable_memories():
        raise TopologyError(
            "GPUs that are not here come without their host's memory, in which an offloaded "
            "optimiser keeps its state: compile the step for a TPU, or where the GPUs are"
        )
    start = time.perf_counter()
    traced = step.trace(state, frozen, batch, key)
    seconds = {"trace": time.perf_counter() - start}
    flops = traced_flops(traced.jaxpr)
    start = time.perf_counter()
    # By itself it is lowered for the machine's own platform where a rule depends on that.
    lowered = traced.lower(lowering_platforms=("cuda",)) if gpu else traced.lower()
    seconds["lower"] = time.perf_counter() - start
    parts = argument_bytes(state, frozen, batch, key)
    start = time.perf_counter()
    try:
        with not_cached():
            compiled = lowered.compile(None if options is None else dict(options))
    except jax.errors.JaxRuntimeError as e:
        seconds["compile"] = time.perf_counter() - start
        memory = _too_much(e, parts, chip)
        return Report(chip, mesh, memory, False, flops, 0.0, 0.0, [], None, seconds, "")
    seconds["compile"] = time.perf_counter() - start
    try:
        text = compiled.as_text()
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        raise TopologyError(mismatch()) from e
    assert text is not None
    program = parse(text)
    memory = _memory(compiled.memory_analysis(), parts, chip, gpu)
    fits = not gpu or memory.total <= memory.limit
    found = collectives(program, mesh.size)
    own, moved = program_flops(program), traffic(program)
    estimate = roofline(chip, mesh, own, moved, found)
    return Report(chip, mesh, memory, fits, flops, own, moved, found, estimate, seconds, text)


def options_for(mesh: Mesh, plain: bool = False) -> dict[str, Any]:
    """Options of the compiler for a mesh's devices: `GATHERS`, and `PLAIN` if that is asked for.

    The compiler for GPUs does by itself what they ask that for TPUs to do.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {**GATHERS, **(PLAIN if plain else {})}


@contextmanager
def not_cached() -> Generator[None]:
    """Without JAX's cache on disk: it stores such programs and cannot read them again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, math.inf)
        yield
    finally:
        jax.config.update(name, before)


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's arrays, with shardings."""

    def of(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(of, tree, shardings)


def argument_bytes(state: State, frozen: Any, batch: Any, key: Any = None) -> dict[str, int]:
    """Bytes of a step's arguments on one device, by kind, without padding; none on the host."""
    trees = {
        "trainable": state.trainable,
        "frozen": frozen,
        "optimiser": state.optimiser,
        "batch": batch,
        "other": (state.step, state.skipped, key),
    }
    return {kind: sum(_shard_bytes(x) for x in jax.tree.leaves(t)) for kind, t in trees.items()}


def _shard_bytes(x: Any) -> int:
    if x.sharding is not None and x.sharding.memory_kind == HOST:
        return 0
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _memory(analysis: Any, parts: dict[str, int], chip: Chip, gpu: bool) -> Memory:
    inputs = analysis.argument_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    # The peak is what the TPU compiler holds against the limit. temp_size_in_bytes is more there:
    # what is never alive at the same time counts twice in it. It counts the host's memory too.
    host = analysis.host_argument_size_in_bytes + analysis.host_output_size_in_bytes
    host += analysis.host_temp_size_in_bytes - analysis.host_alias_size_in_bytes
    temporaries = analysis.peak_memory_in_bytes - host - inputs - outputs
    if gpu:  # one buffer for them all, taken as a whole
        temporaries = analysis.temp_size_in_bytes
    return Memory(
        # Below zero without the arguments that nothing reads, which are not passed.
        {**parts, "padding": max(inputs - sum(parts.values()), 0)},
        outputs,
        max(temporaries, 0),
        analysis.generated_code_size_in_bytes,
        chip.hbm / chip.devices,
        host,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _too_much(e: Exception, parts: dict[str, int], chip: Chip) -> Memory:
    """The memory that the compiler says it would need; where it is another error, that."""
    needed = re.search(r"(temporaries \(|Used )([\d.]+)([KMGT]?)", str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or needed is None:
        raise e
    amount = round(float(needed[2]) * _UNITS[needed[3]])
    if needed[1] == "Used ":  # of everything
        amount = max(amount - sum(parts.values()), 0)
    return Memory({**parts, "padding": 0}, 0, amount, 0, chip.hbm / chip.devices)
