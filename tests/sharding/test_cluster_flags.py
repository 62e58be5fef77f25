"""Recommended flags: the installed compilers know every one of them."""

import importlib.util
import os
import subprocess
import sys

import pytest

from sharding.cluster_flags import KINDS, as_environment, recommended_flags


def run(code, **environ):
    command = [sys.executable, "-c", code]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def test_the_compiler_knows_the_flags_of_cpus_and_gpus():
    """XLA ends a process for a flag that it does not know, whatever the hardware."""
    code = "import jax; print(jax.devices())"
    flags = as_environment((*recommended_flags("cpu"), *recommended_flags("h100")))
    done = run(code, **flags)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = run(code, XLA_FLAGS=flags["XLA_FLAGS"] + " --xla_gpu_no_such_flag=1")
    assert wrong.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag=1" in wrong.stderr


def test_the_tpu_compiler_knows_the_flags_of_tpus():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu, which knows the flags of TPUs")
    code = "from sharding.topologies import topology; print(len(topology('v5e:2x2')))"
    every = {str(f): f for kind in ("v5e", "v5p", "v6e") for f in recommended_flags(kind, 2)}
    flags = as_environment(every.values())
    done = run(code, **flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "4"
    wrong = run(code, LIBTPU_INIT_ARGS=flags["LIBTPU_INIT_ARGS"] + " --xla_tpu_no_such_flag=1")
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in wrong.stderr


def test_a_shell_reads_what_is_printed():
    script = subprocess.run(
        [sys.executable, "-m", "sharding.cluster_flags", "h100"], capture_output=True, text=True
    ).stdout
    shell = f'export XLA_FLAGS="--xla_dump_to=/x"\n{script}\necho "$XLA_FLAGS"'
    got = subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout.split()
    want = as_environment(recommended_flags("h100"))["XLA_FLAGS"].split()
    assert got == ["--xla_dump_to=/x", *want]


def test_every_flag_says_what_it_does_and_who_says_so():
    for kind in KINDS:
        flags = recommended_flags(kind)
        assert flags
        assert all(f.does and "." in f.source for f in flags)
        assert len({(f.variable, f.name) for f in flags}) == len(flags)
    assert len(recommended_flags("v5e", 2)) > len(recommended_flags("v5e"))


@pytest.mark.parametrize(
    ("kind", "slices", "what"),
    [("H100", 1, "'h100'"), ("zx81", 1, "There are cpu"), ("h100", 2, "2 of h100")],
)
def test_unknown_hardware_is_told(kind, slices, what):
    with pytest.raises(ValueError, match=what):
        recommended_flags(kind, slices)
