"""What a command sets before JAX starts: how memory is held, and where programs are cached."""

from __future__ import annotations

import os
import pathlib
import re
import sys

# Each step's temporary buffer is one large allocation, which glibc would map afresh: the kernel
# then clears it page by page. Kept in one heap instead (`mmap_max=0`, never trimmed), an aligned
# block leaves the piece cut off behind it to a cache of small blocks, where it does not join its
# hole again: the next step's block does not fit there, and three are held. So there are no such
# caches (`tcache_max`, `mxfast`).
TUNABLES = ":".join(
    (
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1000000000000",
        "glibc.malloc.arena_max=1",
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.tcache_max=16",
        "glibc.malloc.mxfast=0",
    )
)


def malloc_environment() -> dict[str, str]:
    """`GLIBC_TUNABLES` that make a step's memory cheap to get; empty where it is set already, where
    the C library is another one, and on hosts of an accelerator.
    """
    accelerator = any(
        pathlib.Path(p).exists() for p in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio")
    )
    if not sys.platform.startswith("linux") or accelerator or "GLIBC_TUNABLES" in os.environ:
        return {}
    return {"GLIBC_TUNABLES": TUNABLES} if "glibc" in _libc() else {}


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return ""


def threads_environment() -> dict[str, str]:
    """`NPROC`, so many threads that virtual devices of a CPU can all meet in a collective: with
    fewer than devices they wait for one another for ever. Empty where there are none, or it is set.
    """
    flag = r"xla_force_host_platform_device_count=(\d+)"
    devices = re.search(flag, os.environ.get("XLA_FLAGS", ""))
    if devices is None or "NPROC" in os.environ:
        return {}
    return {"NPROC": str(max(2 * int(devices[1]), os.cpu_count() or 1))}


def restart_tuned() -> None:
    """Start this command again with what its process has to be started with, if anything."""
    environment = malloc_environment() | threads_environment()
    if environment and sys.orig_argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | environment)


def share_device() -> None:
    """Take memory of an accelerator as it is needed: several processes are to have some."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def cache_programs(folder: pathlib.Path) -> None:
    """Keep compiled programs in `folder`, for the next run."""
    import jax

    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def one_at_a_time() -> None:
    """On a CPU have a call return when it is done, its temporary memory free again. Results are
    there a little before that is, and what starts then takes memory beside it, of the same size.

    It has to be said before JAX's first use of the CPU.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
