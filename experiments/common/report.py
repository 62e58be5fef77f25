"""What a run writes down: JSON files, the machine, versions, and mean and deviation over seeds."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft._disk import atomically

PACKAGES = ("jpeft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


# The compilers of `sharding.aot`: what is compiled for machines that are not there depends on them.
COMPILERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, of this project's packages and of `more`, where installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, the memory, JAX's devices, and today's date."""
    import jax

    devices = jax.devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "platform": devices[0].platform,
        "devices": [d.device_kind for d in devices],
    }


def device_name(machine: Mapping[str, Any]) -> str:
    """What a machine computes with: its processor, or its accelerators."""
    if machine["platform"] == "cpu":
        return machine["processor"]
    return ", ".join(dict.fromkeys(machine["devices"]))


def runs_elsewhere(result: Mapping[str, Any]) -> str:
    """The runs of a sweep that other devices made, in words; nothing where there are none."""
    return "".join(f"; {n} of the runs on {d}" for d, n in result.get("elsewhere", {}).items())


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> dict[str, float]:
    """MiB: the process's largest resident set, and the device's peak where it tells."""
    import jax

    out = {"rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        out["device_mib"] = stats["peak_bytes_in_use"] / 2**20
    return out


def mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    """`mean`, and `std` as a sample's (0 for one value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}


def scored(values: Sequence[float]) -> dict[str, Any]:
    """`mean_and_deviation` with the `values` themselves, for intervals."""
    return mean_and_deviation(values) | {"values": list(values)}


def without_folders(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary, with None for folders, and models' last three names."""
    about = dataclasses.asdict(config)
    for name, value in about.items():
        if isinstance(value, pathlib.Path):
            about[name] = None
        elif name == "models":
            about[name] = [last_names(x) for x in value]
    return about


def last_names(model: str) -> str:
    """The last three names of a directory: a pre-trained model's family, size and step."""
    return "/".join(pathlib.Path(model).parts[-3:])


def model_title(model: str) -> str:
    """A model in words: of a family that `pretrain` wrote its name, size and step, else the last
    name of its directory.
    """
    *_, family, size, last = ("", "", *pathlib.Path(model).parts)
    if last.startswith("step_"):
        return f"{family} {size}, step {int(last.removeprefix('step_')):,}"
    return f"{family} {size}".strip() if last == "model" and size else last


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, appearing whole; of a job of several processes the first one writes it.

    **Raises:** `OSError`, and then the file is as before.
    """
    from sharding.cluster import is_main

    if not is_main():
        return
    text = json.dumps(value, indent=2, default=str) + "\n"
    atomically({path: lambda p: p.write_text(text, encoding="utf-8")})
