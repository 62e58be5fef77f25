"""Steps compiled for GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from sharding import AXES, make_mesh
from sharding.aot import TopologyError, options_for, topology
from sharding.chips import CHIPS, chip_of
from sharding.costs import program_flops
from sharding.gpus import GPUS, gpus
from sharding.offload import offloaded
from sharding.roofline import group_bandwidth
from tests.gpus import needs_cuda_compiler
from tests.sharding.stack import LAYERS, ROWS, WIDTH, compiled, moved

pytestmark = pytest.mark.xdist_group("cuda")


@functools.cache
def report(stage, name="h100:1x8", rows=ROWS, optimiser=None):
    devices = topology(name)
    return compiled(stage, devices, options_for(make_mesh(None, devices)), rows, optimiser)


@needs_cuda_compiler
def test_the_devices_of_hosts():
    devices = topology("h100:2x4")
    assert len(devices) == 8
    assert [d.process_index for d in devices] == [0] * 4 + [1] * 4
    assert {d.platform for d in devices} == {"gpu"}
    # The outermost axis runs between the hosts.
    mesh = make_mesh("data=2,fsdp=4", devices)
    assert [d.process_index for d in mesh.devices[0, :, 0]] == [0] * 4


@needs_cuda_compiler
@pytest.mark.parametrize("name", GPUS)
def test_every_kind_compiles_and_its_figures_are_known(name):
    (device,) = topology(f"{name}:1x1")
    assert chip_of(device.device_kind) is CHIPS[name]
    sharding = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    made = jax.jit(jnp.matmul).trace(x, x).lower(lowering_platforms=("cuda",)).compile()
    assert program_flops(made.as_text()) == 2 * 256**3


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("stage", "found"),
    [
        (0, {"all-reduce": 1}),
        (2, {"reduce-scatter": 1, "all-gather": 1}),
        (3, {"reduce-scatter": 1, "all-gather": 2 + 1 / LAYERS}),
    ],
)
def test_what_goes_over_the_wires_is_what_theory_says(stage, found):
    assert moved(report(stage)) == found


@needs_cuda_compiler
def test_at_stage_3_layers_are_gathered_one_at_a_time():
    gathers = [c for c in report(3).collectives if c.kind == "all-gather"]
    assert all(c.elements <= WIDTH * WIDTH for c in gathers)
    assert (LAYERS,) in {c.loops for c in gathers}


@needs_cuda_compiler
@pytest.mark.parametrize("stage", [0, 3])
def test_the_parts_add_up(stage):
    m = report(stage).memory
    assert m.total == sum([*m.arguments.values(), m.outputs, m.temporaries, m.code])
    weights, shards = 2 * LAYERS * WIDTH * WIDTH, {0: 1, 3: 8}[stage]
    assert m.arguments["trainable"] == weights // shards
    assert m.arguments["optimiser"] == 2 * weights // shards + 4  # and Adam's count
    assert m.temporaries >= 2 * WIDTH * WIDTH


@needs_cuda_compiler
def test_no_device_computes_what_another_does():
    r = report(3)
    assert r.flops == 2 * ROWS * WIDTH * WIDTH * (1 + 4 * LAYERS)
    assert r.flops_per_device * r.devices == pytest.approx(r.flops, rel=0.01)
    assert 0 < r.utilisation() <= 1


@needs_cuda_compiler
def test_what_does_not_fit_is_told():
    r = report(3, rows=2**30)
    assert r.memory.total > r.memory.limit == CHIPS["h100"].hbm
    assert not r.fits
    assert report(3).fits


@needs_cuda_compiler
def test_an_offloaded_optimiser_is_refused():
    with pytest.raises(TopologyError, match="without their host's memory"):
        report(0, "h100:1x1", optimiser=offloaded(optax.adam(1e-3)))


class Card:
    """A GPU of a host."""

    platform, coords = "gpu", (0, 0, 0)

    def __init__(self, host):
        self.process_index = host


def test_rings_between_hosts_go_through_every_cards_network_port():
    h100 = CHIPS["h100"]
    cards = np.array([Card(i // 8) for i in range(16)], object)
    pair = Mesh(cards.reshape(2, 8, 1), AXES)
    assert group_bandwidth(h100, pair, 8) == h100.link
    assert group_bandwidth(h100, pair, 2) == h100.network
    assert group_bandwidth(h100, pair, 16) == 8 * h100.network
    assert 8 * h100.network < h100.link


def test_a_product_of_cublas_is_counted():
    text = """
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %c = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[64,16]{1,0} get-tuple-element(%c), index=0
}
"""
    assert program_flops(text) == 2 * 64 * 32 * 16


@pytest.mark.parametrize(
    ("name", "slices", "told"),
    [
        ("h100", 1, "how many hosts have how many GPUs each; examples: h100:1x8"),
        ("h100:8", 1, "how many hosts have how many GPUs each"),
        ("h100:0x8", 1, "how many hosts have how many GPUs each"),
        ("h300:1x8", 1, "did you mean 'h[12]00'.*Those of GPU are a100, a6000"),
        ("h100:2x8", 2, "slices are of TPUs.*as in h100:2x8"),
        ("h100:2x8", 0, "at least 1"),
    ],
)
def test_topologies_that_are_none(name, slices, told):
    with pytest.raises(TopologyError, match=told):
        topology(name, slices)


def test_without_the_plugin_it_says_how_to_get_it(monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", none)
    with pytest.raises(TopologyError, match=f"jax-cuda12-plugin=={jax.__version__}"):
        gpus("h100", "1x8")
