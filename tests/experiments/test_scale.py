"""The experiments over several devices and processes, and in other numbers."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from experiments import lora_glue
from experiments.common.pipeline import collate
from experiments.common.runtime import threads_environment
from experiments.finetune import Config as FinetuneConfig
from experiments.finetune import main as finetune
from experiments.longlora import Config as LongConfig
from experiments.longlora import main as longlora
from experiments.lora_glue import Config, main
from tests.sharding.job import with_devices
from tests.tiny import write_model, write_task

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    return Config(
        task="sst2",
        data=write_task(folder / "data"),
        model=str(write_model(folder / "model")),
        method="lora",
        batch=8,
        max_steps=6,
        lr=1e-2,
        buckets=1,
        dropout=False,
        baseline=False,
    )


def losses(config):
    return main(config, Console(file=io.StringIO()))["seeds"][0]["losses"]


@pytest.fixture(scope="module")
def alone(config):
    """One device's run, whole."""
    return main(config, Console(file=io.StringIO()))["seeds"][0]


@pytest.fixture(scope="module")
def full(config):
    """The losses in fp32 of everything trained."""
    return losses(dataclasses.replace(config, method="full", lr=1e-3))


TUNED = {"batch": 8, "max_steps": 3, "generate": 2, "new_tokens": 4, "held_out": 20, "buckets": 1}


@pytest.fixture(scope="module")
def tuned():
    """One device's run of a language model."""
    return finetune(FinetuneConfig(pack=True, **TUNED), Console(quiet=True))


@pytest.mark.xdist_group("alone")
@pytest.mark.parametrize(
    ("stage", "mesh", "accumulate"), [(3, "all", 1), (0, "data=2,fsdp=2,tensor=2", 2)]
)
def test_a_mesh_changes_no_loss(config, alone, stage, mesh, accumulate):
    split = dataclasses.replace(config, mesh=mesh, stage=stage, accumulate=accumulate)
    np.testing.assert_allclose(losses(split), alone["losses"], atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_of_a_short_batch_weigh_by_their_rows(config, rows):
    directory = pathlib.Path(config.model)
    prepared = lora_glue.prepare(config, directory)
    batch = collate(prepared.train[:rows], prepared.train_shapes, prepared.pad)

    def taken(accumulate):
        split = dataclasses.replace(config, accumulate=accumulate)
        model = lora_glue.build(split, directory, 2, 0)
        trainer = lora_glue.trainer_of(split, model, 0, 5)
        _, metrics = trainer.step(trainer.init(), trainer.frozen, batch, trainer.key(0))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    assert taken(8) == pytest.approx(taken(1), rel=1e-5)


@pytest.mark.xdist_group("full")
@pytest.mark.parametrize("precision", ["bfloat16", "mixed", "stochastic"])
def test_other_numbers_train(config, full, precision):
    got = losses(dataclasses.replace(config, precision=precision, method="full", lr=1e-3))
    assert got != full
    np.testing.assert_allclose(got, full, atol=0.05)


@pytest.mark.xdist_group("tuned")
def test_language_models_on_a_mesh(tuned):
    config = FinetuneConfig(pack=True, mesh="fsdp=4,tensor=2", **TUNED)
    got = finetune(config, Console(quiet=True))
    np.testing.assert_allclose(got["losses"], tuned["losses"], atol=2e-4)
    assert got["answers"] == tuned["answers"]


@pytest.mark.xdist_group("tuned")
def test_what_remat_keeps_changes_no_loss(tuned):
    more = {"generate": 0, "remat": True, "keep": "dots_without_batch"}
    got = finetune(FinetuneConfig(pack=True, **TUNED | more), Console(quiet=True))
    np.testing.assert_allclose(got["losses"], tuned["losses"], atol=1e-5)


def test_wrong_layouts_are_told(config):
    with pytest.raises(ValueError, match="no axis 'model'"):
        losses(dataclasses.replace(config, mesh="model=8"))
    with pytest.raises(ValueError, match="has 6 rows, which 8 devices cannot share"):
        losses(dataclasses.replace(config, mesh="all", batch=6))


def test_virtual_devices_have_threads(monkeypatch):
    monkeypatch.delenv("NPROC")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=64")
    assert threads_environment() == {"NPROC": "128"}
    monkeypatch.setenv("XLA_FLAGS", "")
    assert threads_environment() == {}


def job(experiment, *arguments, processes=2, devices=4):
    """Run a command as a scheduler starts it, over loopback: what each process prints."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", f"experiments.{experiment}", *map(str, arguments)]
    running = []
    for i in range(processes):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": with_devices(devices // processes),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(i),
        }
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipe))
    told = [p.communicate(timeout=240)[0] for p in running]
    return told, [p.returncode for p in running]


def arguments_of(config, out):
    return ["--task", "sst2", "--data", config.data, "--model", config.model, "--batch",
            config.batch, "--max-steps", 6, "--lr", 0.01, "--no-dropout", "--no-baseline",
            "--buckets", 1, "--save-every", 2, "--out", out]  # fmt: skip


@pytest.mark.xdist_group("alone")
@pytest.mark.slow
def test_two_processes_write_one_report(config, alone, tmp_path):
    told, codes = job("lora_glue", *arguments_of(config, tmp_path / "out"))
    assert codes == [0, 0], "\n".join(told)
    assert "written to" in told[0]
    assert "written to" not in told[1]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    np.testing.assert_allclose(result["seeds"][0]["losses"], alone["losses"], atol=2e-5)
    lines = (tmp_path / "out" / "seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [*range(1, 7), 6]
    assert (tmp_path / "out" / "seed0" / "adapter.safetensors").is_file()
    assert result["seeds"][0]["validation"] == pytest.approx(alone["validation"], abs=1e-6)


@pytest.mark.slow
def test_one_processs_run_goes_on_in_two(config, tmp_path):
    """From eight devices to four, with what each process makes of a batch another one."""
    out = tmp_path / "out"
    begun = dataclasses.replace(config, out=out, save_every=2, mesh="all")
    want = losses(begun)
    (out / "result.json").unlink()
    (out / "seed0" / "result.json").unlink()
    shutil.rmtree(out / "seed0" / "checkpoint" / "6")
    told, codes = job("lora_glue", *arguments_of(config, out), "--mesh", "all", "--resume")
    assert codes == [0, 0], "\n".join(told)
    got = json.loads((out / "result.json").read_text())["seeds"][0]["losses"]
    assert got[:4] == want[:4]
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.xdist_group("tuned")
@pytest.mark.slow
def test_two_processes_tune_a_language_model_as_one(tuned, tmp_path):
    flags = [x for k, v in TUNED.items() for x in (f"--{k.replace('_', '-')}", v)]
    flags += ["--pack", "--out", tmp_path / "out"]
    told, codes = job("finetune", *flags)
    assert codes == [0, 0], "\n".join(told)
    got = json.loads((tmp_path / "out" / "result.json").read_text())
    np.testing.assert_allclose(got["losses"], tuned["losses"], atol=1e-5)
    assert got["held_out"] == pytest.approx(tuned["held_out"], rel=1e-5)
    assert got["answers"] == tuned["answers"]


@pytest.mark.slow
def test_two_processes_extend_a_llama_as_one(tmp_path):
    options = {"steps": 2, "batch": 4, "rows": 2, "rounds": 1}
    want = longlora(LongConfig(variants=("lora",), **options), Console(quiet=True))["rows"]
    flags = [x for k, v in options.items() for x in (f"--{k}", v)]
    told, codes = job("longlora", "--variants", "lora", *flags, "--out", tmp_path / "out")
    assert codes == [0, 0], "\n".join(told)
    got = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    np.testing.assert_allclose(got["lora"]["losses"], want["lora"]["losses"], atol=1e-5)
    assert got["lora"]["perplexity"] == pytest.approx(want["lora"]["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_rows_that_processes_cannot_share_are_told(tmp_path):
    told, codes = job("finetune", "--batch", 6, "--max-steps", 1)
    assert codes == [2, 2]
    assert all("has 6 rows, which 4 devices cannot share evenly: change" in t for t in told)
