"""The commands that compile for machines that are not there, for GPUs."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from experiments import aot, qlora, zero
from experiments.common import qlora_account
from sharding.topologies import TopologyError
from tests.gpus import needs_cuda_compiler
from tests.tiny import LLAMA

pytestmark = pytest.mark.xdist_group("cuda")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA.to_hf()))
    return str(path)


def said_by(main, config):
    out = io.StringIO()
    return main(config, Console(file=out, width=200)), out.getvalue()


@needs_cuda_compiler
@pytest.mark.parametrize(
    "more",
    [
        {"method": "lora"},
        {"method": "full", "accumulate": 2, "mesh": "data=2,fsdp=4"},
        {"method": "lora", "quantize": "nf4", "stage": 0},
    ],
)
def test_a_step_on_two_hosts(model, tmp_path, more):
    options = {"topology": "h100:2x4", "model": model, "batch": 16, "sequence": 64, **more}
    result, said = said_by(aot.main, aot.Config(**options, out=tmp_path / "out"))
    held = result["bytes_per_device"]
    assert result["fits"]
    assert held["total"] == sum(v for k, v in held.items() if k not in ("total", "limit"))
    assert result["flops"]["replication"] == pytest.approx(1, abs=0.02)
    assert 0 < result["estimate"]["mfu"] <= 1
    assert "8 devices of h100:2x4" in said
    assert any(name.startswith("jax-cuda") for name in result["versions"])
    with pytest.raises(ValueError, match="holds a result: pass --overwrite"):
        aot.main(aot.Config(**options, out=tmp_path / "out"), Console(file=io.StringIO()))


@needs_cuda_compiler
def test_what_a_gpu_that_is_not_there_cannot_be_compiled_for(model):
    options = {"topology": "h100:1x1", "model": model, "batch": 4, "sequence": 64}
    with pytest.raises(TopologyError, match="without their host's memory"):
        aot.main(aot.Config(**options, offload=True), Console(file=io.StringIO()))


@needs_cuda_compiler
def test_the_walk_through_a_step(tmp_path):
    config = zero.Config(
        width=1024, layers=2, rows=2048, devices=(1, 4), stages=(0, 3), topology="h100:1x4"
    )
    result, _ = said_by(zero.main, config)
    walks = {s: [(m["layer"], m["what"]) for m in w["moments"]] for s, w in result["walks"].items()}
    for layer in ("M0 forward", "M1 forward", "M1 backward", "M0 backward"):
        assert (layer, "gather") in walks["3"]
    assert not any(what == "gather" and layer for layer, what in walks["0"])
    assert all(any(what == "reduce" for _, what in walk) for walk in walks.values())


@needs_cuda_compiler
def test_the_account_leaves_out_what_the_host_would_keep(monkeypatch):
    first, hosted = (
        next(c for c in qlora_account.cases() if c.model == "llama-3-8b" and c.offload == offload)
        for offload in (False, True)
    )
    cases = [dataclasses.replace(c, model="llama-3.2-1b", sequence=16) for c in (first, hosted)]
    monkeypatch.setattr(qlora_account, "cases", lambda: cases)
    config = qlora.Config(report_65b=True, topology="a6000:1x1")
    result, said = said_by(qlora.main, config)
    (row,) = result["rows"]
    assert row["total"] == sum(row["bytes"].values()) < 4e9
    assert result["topology"] == "a6000:1x1"
    assert "is left out" in said
    assert "on the host" not in said.replace("kept on the host", "")


def test_a_topology_without_the_report():
    with pytest.raises(ValueError, match="--topology is of --report-65b"):
        qlora.main(qlora.Config(topology="a6000:1x1"), Console(file=io.StringIO()))
