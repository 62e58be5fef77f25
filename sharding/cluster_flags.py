"""Compiler flags that others have found good, by hardware. Nothing here sets them.

`python -m sharding.cluster_flags v5p` prints them as a shell reads them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable

GPUS = ("gpu", "a100", "h100", "h200")
TPUS = ("v5e", "v5p", "v6e")
KINDS = ("cpu", *GPUS, *TPUS)
XLA, TPU = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
JAX_DOCS = "docs.jax.dev/en/latest/xla_flags.html"
GPU_TIPS = "docs.jax.dev/en/latest/gpu_performance_tips.html"
NVIDIA = "docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"
MAXTEXT = "github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py"


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting of the compiler.

    **Attributes:** `variable`, the environment variable that it stands in; `name`, empty for a
    variable of its own; `value`; `does`, for people; `source`.
    """

    variable: str
    name: str
    value: str
    does: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}" if self.name else self.value


_CPU = (
    Flag(
        *("NPROC", "", "16"),
        "threads of the CPU client: with too few, virtual devices that meet in a collective wait "
        "for one another for ever; 16 are enough for 8 devices",
        "github.com/openxla/xla, xla/pjrt/utils.cc (DefaultThreadPoolSize)",
    ),
)
_GPU = (
    Flag(
        *(XLA, "xla_gpu_enable_latency_hiding_scheduler", "true"),
        "moves collectives so that they run beside computations",
        GPU_TIPS,
    ),
    Flag(
        *(XLA, "xla_gpu_enable_while_loop_double_buffering", "true"),
        "unrolls a scan over layers by two: one layer's weights come while another computes",
        NVIDIA,
    ),
    *(
        Flag(
            *(XLA, f"xla_gpu_{kind}_combine_threshold_bytes", "8589934592"),
            "joins collectives up to this size: at least one layer's weights should go together",
            NVIDIA,
        )
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    ),
    Flag(
        *("XLA_PYTHON_CLIENT_MEM_FRACTION", "", "0.9"),
        "how much of the GPU's memory JAX takes, of which NCCL has to be left some; 0.75 without",
        NVIDIA,
    ),
)
# What holds for every TPU: the compiler's own choice today, said for compilers that choose else.
_TPU = (
    Flag(
        *(TPU, "xla_tpu_enable_async_collective_fusion", "true"),
        "fuses collectives with the computations that run while they are under way",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
    Flag(
        *(TPU, "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true"),
        "all-gathers too: stage 3's weights",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
    Flag(
        *(TPU, "xla_tpu_enable_async_collective_fusion_multiple_steps", "true"),
        "one collective may go on beside several computations",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
    Flag(
        *(TPU, "xla_tpu_overlap_compute_collective_tc", "true"),
        "computes and communicates on one TensorCore at a time",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
    Flag(
        *(TPU, "xla_enable_async_all_gather", "true"),
        "all-gathers start early and are waited for late",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
)
_BY_KIND = {
    "v5p": (
        Flag(
            *(TPU, "xla_tpu_megacore_fusion_allow_ags", "false"),
            "leaves all-gathers out of the fusions over both cores of a chip: they overlap instead",
            f"{JAX_DOCS}; github.com/AI-Hypercomputer/maxtext, configs/v5p",
        ),
        Flag(
            *(TPU, "xla_tpu_prefer_async_allgather_to_allreduce", "true"),
            "with the two for all-gathers above: over all three axes of the torus they are gathers "
            "then, and not sums of arrays that are mostly zero, of twice the bytes",
            "github.com/pytorch/xla/issues/6528",
        ),
    ),
    "v6e": (
        Flag(
            *(TPU, "xla_tpu_scoped_vmem_limit_kib", "98304"),
            "the part of a core's fast memory that one fusion may take: larger tiles",
            f"{MAXTEXT}; github.com/apple/axlearn, axlearn/common/compiler_options.py",
        ),
    ),
}
_SLICES = (
    Flag(
        *(TPU, "xla_tpu_enable_data_parallel_all_reduce_opt", "true"),
        "sums of gradients between slices run beside the backward pass",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
    Flag(
        *(TPU, "xla_tpu_data_parallel_opt_different_sized_ops", "true"),
        "so do those of other sizes; takes memory",
        f"{JAX_DOCS}; {MAXTEXT}",
    ),
)


def recommended_flags(kind: str, slices: int = 1) -> tuple[Flag, ...]:
    """What to set on a kind of hardware: where to begin, and then to measure.

    **Arguments:** `kind`, one of `cpu` (virtual devices), `gpu`, `a100`, `h100`, `h200`, `v5e`,
    `v5p`, `v6e`; `slices`, of TPUs.

    **Raises:** `ValueError` for another kind.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind.lower(), KINDS, 1)
        hint = f": did you mean '{near[0]}'?" if near else f". There are {', '.join(KINDS)}."
        raise ValueError(f"there are no flags for '{kind}'{hint}")
    if slices < 1 or (slices > 1 and kind not in TPUS):
        raise ValueError(f"slices counts slices of TPUs, at least 1: {slices} of {kind}")
    if kind == "cpu":
        return _CPU
    if kind in GPUS:
        return _GPU
    return (*_TPU, *_BY_KIND.get(kind, ()), *(_SLICES if slices > 1 else ()))


def as_environment(flags: Iterable[Flag]) -> dict[str, str]:
    """The environment variables that say so."""
    out: dict[str, str] = {}
    for flag in flags:
        out[flag.variable] = f"{out.get(flag.variable, '')} {flag}".strip()
    return out


def main() -> None:
    """Print the flags of a kind of hardware, with what they do, as lines of a shell script."""
    parser = argparse.ArgumentParser(prog="python -m sharding.cluster_flags", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--slices", type=int, default=1, help="slices of TPUs (default: 1)")
    args = parser.parse_args()
    try:
        flags = recommended_flags(args.kind, args.slices)
    except ValueError as e:
        parser.error(str(e))
    for flag in flags:
        print(f"# {flag.name or flag.variable}: {flag.does} ({flag.source})")
    for variable, value in as_environment(flags).items():
        kept = f"${{{variable}:+${variable} }}" if " " in value or "--" in value else ""
        print(f'export {variable}="{kept}{value}"')


if __name__ == "__main__":
    main()
