"""Runs in processes of their own: the same results, and failures told by name."""

import dataclasses
import functools
import io
import os
import pathlib
import pickle
import signal
import threading
import time

import pytest
from rich.console import Console

from experiments import dylora, intrinsic_dimension
from experiments.common import dimensions
from experiments.common.loop import InterruptedRunError
from experiments.common.parallel import Call, FailedCallsError, run_all, tail
from experiments.common.sweep import SweepConfig, runs_of, sweep
from tests.tiny import write_model, write_task

pytestmark = pytest.mark.slow  # every process starts JAX


def noted(path: pathlib.Path, text: str, fail: str | None = None) -> None:
    """Write a file; `fail`, how to go wrong instead."""
    print(f"making {text}")
    if fail == "raise":
        raise ValueError(f"no {text} here")
    if fail == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fail == "wait":
        path.write_text("begun")
        time.sleep(60)
    path.write_text(f"{text} {os.getpid()}")


def calls_of(folder: pathlib.Path, **fails: str | None) -> dict[str, Call]:
    return {
        name: Call(noted, (folder / name, name, fail), folder / "logs" / name)
        for name, fail in fails.items()
    }


def test_calls_are_made_and_failures_told(tmp_path):
    said = io.StringIO()
    calls = calls_of(tmp_path, a=None, b="raise", c="die", d=None, e=None)
    with pytest.raises(FailedCallsError) as caught:
        run_all(calls, 2, Console(file=said, width=100))
    text = str(caught.value)
    assert "2 of 5 runs failed" in text
    assert "--- b: ValueError: no b here\nmaking b\nTraceback" in text
    assert "--- c: the process ended with exit code -9\nmaking c" in text
    made = {n: (tmp_path / n).read_text().split() for n in "ade"}
    assert all(words[0] == n for n, words in made.items())
    assert len({words[1] for words in made.values()} | {str(os.getpid())}) > 1  # not in this one
    assert "a done in" in said.getvalue()
    assert "b failed" in said.getvalue()
    assert tail(tmp_path / "logs" / "a") == "making a"
    assert tail(tmp_path / "none") == ""


def test_a_signal_stops_them(tmp_path):
    def stop() -> None:
        while not (tmp_path / "a").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    start = time.perf_counter()
    with pytest.raises(InterruptedRunError):
        run_all(calls_of(tmp_path, a="wait"), 2, Console(file=io.StringIO()))
    assert time.perf_counter() - start < 40
    assert (tmp_path / "a").read_text() == "begun"


@pytest.fixture
def made(tmp_path):
    """Options of a small sweep."""
    return {
        "model": str(write_model(tmp_path / "model")),
        "data": write_task(tmp_path / "task"),
        "task": "sst2",
        "method": "head",
        "epochs": 1,
        "batch": 8,
        "length": 8,
        "out": tmp_path / "out",
    }


def counted(trainer, state, prepared, times):
    """What a run adds to its result."""
    return {"counted": times * len(prepared.validation)}


def more(name):
    return functools.partial(counted, times=3) if name == "slow" else None


def test_a_sweep_in_processes_has_the_same_results(made, tmp_path):
    said = io.StringIO()
    console = Console(file=said, width=140)
    config, changes = SweepConfig(**made), {"slow": {"lr": 1e-3}, "fast": {"lr": 1e-1}}
    alone = sweep(runs_of(dataclasses.replace(config, out=None), changes), console, more)
    runs = runs_of(config, changes)
    results = sweep(runs, console, more, processes=2)
    for name in changes:
        losses = [r[name]["seeds"][0]["losses"] for r in (alone, results)]
        assert losses[0] == losses[1]
        assert not list((made["out"] / "runs" / name).glob("seed*/checkpoint"))
    assert results["slow"]["seeds"][0]["counted"] == 60
    assert "2/2: fast begins" in said.getvalue()
    assert "loss" in (made["out"] / "runs" / "fast" / "output.txt").read_text()
    # What stands is kept, and what is lost is made again, with another number of processes.
    (made["out"] / "runs" / "fast" / "result.json").unlink()
    again = sweep(runs, console, more, processes=3)
    assert again["slow"] == results["slow"]
    assert again["fast"]["metrics"] == results["fast"]["metrics"]
    assert "1 of 2 runs are kept from before" in said.getvalue()


def test_failed_runs_are_named(made):
    config = SweepConfig(**made | {"accumulate": 3})
    with pytest.raises(
        FailedCallsError, match=r"1 of 1 runs failed\n--- long: ValueError: --accumulate 3"
    ):
        sweep(runs_of(config, {"long": {}}), Console(file=io.StringIO()), processes=2)


def test_what_runs_add_can_be_sent_to_a_process():
    assert pickle.loads(pickle.dumps(dimensions.constant))
    assert pickle.loads(pickle.dumps(functools.partial(dylora.at_ranks, ranks=(1, 2))))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"processes": 0}, "--processes 0: at least 1"),
        ({"processes": 2}, "--processes needs --out"),
        ({"processes": 2, "mesh": "all"}, "leave out --mesh"),
    ],
)
def test_processes_that_cannot_be_are_refused(made, options, told):
    made = made | ({} if "mesh" in options else {"out": None})
    config = intrinsic_dimension.Config(**made | {"method": "lora"} | options)
    with pytest.raises(ValueError, match=told):
        intrinsic_dimension.main(config, Console(file=io.StringIO()))
    assert made["out"] is None or not made["out"].exists()


def test_no_process_makes_no_call(tmp_path):
    with pytest.raises(ValueError, match="processes is how many .* at least 1: 0"):
        run_all(calls_of(tmp_path, a=None), 0, Console(quiet=True))
    run_all({}, 0, Console(quiet=True))
