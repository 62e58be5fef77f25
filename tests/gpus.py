"""What tests of programs for GPUs that are not there need."""

import importlib.util

import pytest


def _installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


needs_cuda_compiler = pytest.mark.skipif(
    not any(map(_installed, ("xla_cuda12", "xla_cuda13"))),
    reason="JAX's CUDA plugin, which compiles for GPUs, is not installed",
)
