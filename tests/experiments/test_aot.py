"""Models compiled for TPUs; the largest batch that fits; the sizes of published models."""

import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from flax import nnx
from rich.console import Console

from experiments import aot
from experiments.common.largest import Tried, apart, largest
from experiments.common.models import ModelError
from experiments.common.named import NAMED, config_of, named_config
from jpeft.models.llama import Llama
from sharding.topologies import TopologyError
from tests.tiny import LLAMA

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)
# Programs are compiled once: in one worker.
pytestmark = pytest.mark.xdist_group("tpu")
# Parameters of the published checkpoints; of Gemma 3's larger ones the text model's.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
}


@pytest.mark.parametrize("name", NAMED)
def test_named_models_have_the_published_number_of_parameters(name):
    config = named_config(name)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(x.shape) for x in leaves) == PUBLISHED[name]


def test_a_wrong_name_offers_the_nearest():
    with pytest.raises(ModelError, match="'llama3-8b': did you mean 'llama-3-8b'"):
        config_of("llama3-8b")
    with pytest.raises(ModelError, match=r"there is no model 'xyzzy'\. By name there are llama-7b"):
        config_of("xyzzy")


def test_configurations_are_read_from_files_too(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA.to_hf()))
    assert config_of(str(path)).hidden_size == config_of(str(tmp_path)).hidden_size == 128
    path.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"config\.json: model_type is 'bert'"):
        config_of(str(tmp_path))


@pytest.fixture
def small(tmp_path):
    """Options that make a small program."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA.to_hf()))
    options = {"topology": "v5e:2x4", "batch": 16, "sequence": 64}
    return {**options, "model": str(path), "out": tmp_path / "out"}


def run(options):
    said = io.StringIO()
    result = aot.main(aot.Config(**options), Console(file=said, width=120))
    return result, said.getvalue()


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("method", "stage", "more"),
    [
        ("lora", 3, {}),
        ("full", 3, {"accumulate": 2}),
        ("prefix", 1, {"mesh": "data=2,fsdp=2,tensor=2"}),
    ],
)
def test_a_report(small, method, stage, more):
    result, said = run(small | {"method": method, "stage": stage, **more})
    assert json.loads((small["out"] / "result.json").read_text())["flops"] == result["flops"]
    held = result["bytes_per_device"]
    assert result["fits"]
    assert held["total"] == sum(v for k, v in held.items() if k not in ("total", "limit"))
    assert result["flops"]["replication"] == pytest.approx(1, abs=0.02)
    assert result["flops"]["model"] < result["flops"]["step"]
    assert 0 < result["estimate"]["mfu"] < result["estimate"]["hfu"] <= 1
    assert f"{result['trained']:,} of {result['parameters']:,} parameters trained" in said
    assert "it fits" in said
    if method == "full":
        # bf16 parameters; fp32 masters and both of Adam's moments.
        assert held["optimiser"] / held["trainable"] == pytest.approx(6, rel=0.01)
        assert held["frozen"] == 0
    else:
        assert held["trainable"] < held["frozen"]


@needs_tpu_compiler
def test_what_does_not_fit_is_told(small):
    result, said = run(small | {"batch": 2**17, "sequence": 1024})
    assert not result["fits"]
    assert result["bytes_per_device"]["total"] > result["bytes_per_device"]["limit"]
    assert result["estimate"] == {}
    assert "it does not fit" in said


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"batch": 12}, "12 rows, which 8 devices cannot share evenly"),
        ({"mesh": "fsdp=3"}, "does not fit 8 devices"),
        ({"options": ("xla_x",)}, "--options takes name=value: 'xla_x' is none"),
        ({"method": "head"}, "is a classifier's"),
        ({"batch": 0}, "--batch 0: at least 1"),
        ({"chunk": 0}, "--chunk 0: at least 1"),
    ],
)
def test_wrong_options(small, wrong, told):
    with pytest.raises(ValueError, match=told):
        run(small | wrong)


def test_a_wrong_topology(small):
    with pytest.raises(TopologyError, match="did you mean 'v5e'"):
        run(small | {"topology": "v5ee:2x4"})


def test_the_command_tells_a_wrong_topology_and_nothing_else():
    command = [sys.executable, "-m", "experiments.aot", "--topology", "v5ee:2x4"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("TPU")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("aot: 'v5ee:2x4' is no topology: did you mean 'v5e'?")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("room", "rows"), [(1, 8), (5.5, 40), (15.9, 120), (47, 352), (100, 768), (1000, 7680)]
)
def test_the_largest_batch_is_found_in_few_tries(room, rows):
    tried = []

    def attempt(n):
        tried.append(n)
        total = n / 8 + 0.01 * (n / 8) ** 0.5  # not quite a line
        return Tried(total, room + 0.1, total <= room + 0.1)

    assert largest(attempt, 8) == rows
    assert len(tried) == len(set(tried)) <= 9


def test_a_size_that_cannot_be_compiled_counts_as_too_much():
    def attempt(n):
        return None if n in (6, 7) else Tried(n, 9.5, n <= 9)

    assert largest(attempt, 1) in (5, 9)
    with pytest.raises(ValueError, match="4 rows, the fewest .* take 0.00 of 0.00 GiB, too much"):
        largest(lambda n: Tried(2, 1, False), 4)
    with pytest.raises(ValueError, match="cannot be compiled"):
        largest(lambda n: None, 4)


def crash(_):
    os.abort()


def test_a_crash_of_the_compiler_takes_its_own_process_alone():
    assert apart(crash, 0) is None
    assert apart(math.sqrt, 4.0) == 2


@needs_tpu_compiler
def test_the_search(small, monkeypatch):
    """What is tried is asked of `compiled`, and the largest one's report is the result's."""

    def pretend(function, config):
        assert function is aot.compiled
        memory = {"total": config.batch * 2**30, "limit": 20 * 2**30}
        fits = config.batch <= 20
        return result | {"bytes_per_device": memory, "fits": fits, "batch": config.batch}

    result, _ = run(small)
    monkeypatch.setattr("experiments.common.largest.apart", pretend)
    options = {k: v for k, v in small.items() if k != "out"} | {"mesh": "data=4,fsdp=1,tensor=2"}
    found, said = run(options | {"search": True})
    assert found["batch"] == 20
    assert {"4", "20", "24"} <= set(found["tried"])
    assert "24 rows: 24.00 of 20.00 GiB, too much" in said


def test_sizes_come_from_the_options():
    config = aot.Config(rank=3, targets=("x",), method="full")
    assert (config.sizes.rank, config.sizes.targets) == (3, ("x",))
    assert config.numbers == "mixed"
    assert dataclasses.replace(config, method="lora").numbers == "bfloat16"
