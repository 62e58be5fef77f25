"""Steps compiled for TPUs that are not there: collectives as theory says, and parts that add up."""

import dataclasses
import functools
import importlib.util
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from sharding import AXES, Zero, make_mesh, make_step
from sharding.aot import PLAIN, argument_bytes, compile_for, topology
from sharding.chips import CHIPS, chip_of
from sharding.hlo import Collective
from sharding.roofline import group_bandwidth, roofline
from sharding.topologies import TopologyError
from sharding.tpus import mismatch
from tests.sharding.stack import LAYERS, ROWS, WIDTH, axes, compiled, loss, moved

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
# Programs are compiled once: in one worker.
pytestmark = pytest.mark.xdist_group("tpu")


@functools.cache
def report(stage, rows=ROWS):
    return compiled(stage, topology("v5e:2x4"), PLAIN, rows)


FROZEN = 1 / LAYERS  # the frozen weight is as large as one layer, and gathered at stage 3


@needs_tpu_compiler
def test_stage_0_sums_gradients():
    assert moved(report(0)) == {"all-reduce": 1}


@needs_tpu_compiler
@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_scatter_gradients_and_gather_parameters(stage):
    assert moved(report(stage)) == {"reduce-scatter": 1, "all-gather": 1}


@needs_tpu_compiler
def test_stage_3_gathers_layers_twice_in_their_loops():
    found = moved(report(3))
    assert found["reduce-scatter"] == 1
    assert found["all-gather"] == 2 + FROZEN
    gathers = [c for c in report(3).collectives if c.kind == "all-gather"]
    assert all(c.elements <= WIDTH * WIDTH for c in gathers)
    assert {c.loops for c in gathers if c.shape[-2:] == (WIDTH, WIDTH)} == {(LAYERS,), ()}


@needs_tpu_compiler
@pytest.mark.parametrize("stage", [0, 3])
def test_the_parts_add_up(stage):
    r = report(stage)
    m = r.memory
    parts = [*m.arguments.values(), m.outputs, m.temporaries, m.code]
    assert m.total == sum(parts)
    assert all(n >= 0 for n in parts)
    assert r.fits
    weights = 2 * LAYERS * WIDTH * WIDTH
    shards = {0: 1, 3: 8}[stage]
    assert m.arguments["trainable"] == weights // shards
    assert m.arguments["optimiser"] == 2 * weights // shards + 4  # and Adam's count
    assert m.arguments["frozen"] == 2 * WIDTH * WIDTH // shards
    assert m.arguments["batch"] == 2 * ROWS * WIDTH // 8
    assert m.arguments["other"] == 8
    assert m.arguments["padding"] < 64 * 1024


@needs_tpu_compiler
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_device_computes_what_another_does(stage):
    r = report(stage)
    products = 2 * ROWS * WIDTH * WIDTH
    # One with the frozen weight; forward, forward again, and two products backward.
    assert r.flops == products * (1 + 4 * LAYERS)
    assert r.flops_per_device * r.devices == pytest.approx(r.flops, rel=0.01)


@needs_tpu_compiler
def test_the_estimate_is_the_longest_of_its_parts():
    r = report(3)
    line = r.roofline
    assert line.compute == pytest.approx(r.flops_per_device / 197e12)
    assert line.memory == pytest.approx(r.traffic / 819e9)
    assert line.seconds == max(line.compute, line.memory, line.wires) == getattr(line, line.bound)
    assert 0 < r.utilisation() <= 1
    assert r.utilisation(r.flops / 2) == pytest.approx(r.utilisation() / 2)


@needs_tpu_compiler
def test_what_does_not_fit_is_told_with_its_size():
    r = report(3, rows=2**28)
    assert not r.fits
    assert r.memory.total > r.memory.limit == 15.75 * 2**30
    assert r.memory.arguments["batch"] == 2 * 2**28 * WIDTH // 8
    assert r.utilisation() is None


@needs_tpu_compiler
def test_the_terminal_is_left_alone_and_so_is_the_environment():
    code = (
        "import os, jax\n"
        "before = dict(os.environ)\n"
        "from sharding.aot import topology\n"
        "print(len(topology('v5p:2x2x1')), dict(os.environ) == before)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TPU")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("4 True\n", "")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5:2x2", "did you mean 'v5[ep]'.*examples: v5e:16x16"),
        ("v5e", "the slice's shape"),
        ("v5e:four", "the slice's shape"),
        ("v9:8x8", "The kinds of TPU are v5e, v5p, v6e, tpu7x.*Those of GPU are a100"),
    ],
)
def test_topologies_that_are_none(name, told):
    with pytest.raises(TopologyError, match=told):
        topology(name)


@needs_tpu_compiler
def test_slices_that_libtpu_does_not_make():
    with pytest.raises(TopologyError, match="makes no topology 'v5e:3x3'.*chips_per_host"):
        topology("v5e:3x3")
    with pytest.raises(TopologyError, match="at least 1"):
        topology("v5e:2x2", 0)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install 'jpeft\[tpu\]'"):
        topology("v5e:2x4")


@needs_tpu_compiler
def test_a_compiler_of_another_jax_is_told():
    assert f"jax[tpu]=={jax.__version__}" in mismatch()


def test_a_step_without_a_mesh_is_refused():
    step = make_step(loss, optax.sgd(0.1))
    state = step.abstract({"layers": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)})
    with pytest.raises(ValueError, match="no mesh"):
        compile_for(step, state, None, None)


def test_argument_bytes_are_of_one_device():
    zero = Zero(make_mesh(), 3, smallest=1)
    step = make_step(loss, optax.sgd(0.1), zero=zero, axes=axes)
    state = step.abstract({"layers": jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)})
    got = argument_bytes(state, jax.ShapeDtypeStruct((3, 5), jnp.bfloat16, sharding=None), None)
    assert got == {"trainable": 256, "frozen": 30, "optimiser": 0, "batch": 0, "other": 8}


def test_chips_are_known_by_their_devices():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    with pytest.raises(ValueError, match="figures of a 'TPU v6 lite pod' are not known: did you"):
        chip_of("TPU v6 lite pod")


@dataclasses.dataclass(frozen=True)
class Device:
    """A chip of a torus."""

    coords: tuple[int, ...]
    slice_index: int = 0


def torus(*shape, slices=1):
    return [Device(c, s) for s in range(slices) for c in np.ndindex(*shape)]


def mesh_of(devices, *sizes):
    array = np.empty(len(devices), object)
    array[:] = devices
    return Mesh(array.reshape(sizes), AXES)


def test_groups_send_over_the_links_of_the_axes_that_they_stretch_over():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    pod = mesh_of(torus(16, 16), 16, 16, 1)
    assert group_bandwidth(v5e, pod, 256) == 4 * v5e.link  # two rings
    assert group_bandwidth(v5e, pod, 16) == 2 * v5e.link  # one
    part = mesh_of(torus(4, 8), 1, 32, 1)
    assert group_bandwidth(v5e, part, 32) == 2 * v5e.link  # two lines
    cube = mesh_of(torus(4, 4, 8), 4, 32, 1)
    assert group_bandwidth(v5p, cube, 128) == 6 * v5p.link
    assert group_bandwidth(v5p, cube, 32) == 4 * v5p.link
    several = mesh_of(torus(4, 4, slices=2), 2, 16, 1)
    assert group_bandwidth(v5e, several, 2) == v5e.network
    assert group_bandwidth(v5e, several, 16) == 2 * v5e.link


def test_the_time_on_the_wires():
    chip = CHIPS["v5e"]
    one = Collective(
        "all-gather", (1024,), "bf16", 1024, 2048, 256, (3,), 3, ((4,),), "a", "main", ""
    )
    line = roofline(chip, mesh_of(torus(16, 16), 1, 256, 1), 197e12, 819e9, [one])
    assert (line.compute, line.memory) == (1, 1)
    assert line.wires == pytest.approx(3 * 2048 * 255 / 256 / (4 * chip.link))
    assert math.isclose(line.seconds, 1)
