"""Meshes from shapes, and how they lie over slices and hosts."""

import dataclasses
import importlib.util

import jax
import pytest

from sharding import batch_shards, make_mesh
from sharding.mesh import _granules, _outer, mesh_sizes
from sharding.topologies import topology


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "tpu"
    slice_index: int = 0


def test_all_devices_are_on_fsdp():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("data=2,fsdp=4", (2, 4, 1)),
        (" data=2 , fsdp=-1", (2, 4, 1)),
        ("tensor=-1", (1, 1, 8)),
        ({"data": 2, "tensor": 2, "fsdp": 2}, (2, 2, 2)),
        (None, (1, 8, 1)),
    ],
)
def test_a_shape_is_read(shape, sizes):
    assert mesh_sizes(shape, 8) == sizes
    assert batch_shards(make_mesh(shape)) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ("data=2", "does not fit 8 devices"),
        ("data=3,fsdp=-1", "does not fit 8 devices"),
        ("model=8", "no axis 'model'"),
        ("data=-1,fsdp=-1", "only one"),
        ("data=0,fsdp=8", "data=0"),
        ("data", "'data' is no axis"),
        ("data=two", "'data=two' is no axis"),
        ("fsdp=2,fsdp=4", "twice"),
    ],
)
def test_a_wrong_shape_is_refused(shape, what):
    with pytest.raises(ValueError, match=what):
        make_mesh(shape)


def test_the_outer_axes_lie_over_the_slow_network():
    assert _outer((2, 16, 4), 2) == [2, 1, 1]
    assert _outer((1, 16, 4), 2) == [1, 2, 1]
    assert _outer((2, 16, 4), 8) == [2, 4, 1]
    with pytest.raises(ValueError, match="3 slices or hosts"):
        _outer((2, 8, 1), 3)


def test_slices_are_told_from_hosts():
    two_slices = [Device(i, i // 2, slice_index=i // 4) for i in range(8)]
    one_slice = [Device(i, i // 2) for i in range(8)]
    hosts = [Device(i, i // 4, "gpu") for i in range(8)]
    assert _granules(two_slices) == [0, 1]
    assert len(_granules(one_slice)) == 1  # its hosts are joined by ICI
    assert _granules(hosts) == [0, 1]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
@pytest.mark.parametrize("shape", ["data=2,fsdp=-1", "data=4,fsdp=-1", "fsdp=-1", "tensor=4"])
def test_the_outermost_axis_runs_between_two_slices(shape):
    """On the devices that libtpu gives for two slices of four chips."""
    shape = shape if "-1" in shape else f"{shape},fsdp=-1"
    mesh = make_mesh(shape, topology("v5e:2x2", slices=2))
    outer = next(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)
    devices = mesh.devices.reshape(2, -1)  # the first half of the outermost axis, and the second
    assert mesh.shape[outer] % 2 == 0
    assert [{d.slice_index for d in half} for half in devices] == [{0}, {1}]
