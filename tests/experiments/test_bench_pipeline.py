"""The input pipeline beside batches out of memory."""

import io
import json

import pytest
from rich.console import Console

from experiments import bench_pipeline
from tests.tiny import write_model, write_task


@pytest.fixture
def options(tmp_path):
    return {
        "model": str(write_model(tmp_path / "model")),
        "data": write_task(tmp_path / "task"),
        "task": "sst2",
        "batch": 8,
        "max_steps": 7,
        "out": tmp_path / "out",
    }


def test_both_are_measured_in_turn(options):
    said = io.StringIO()
    result = bench_pipeline.main(
        bench_pipeline.Config(**options, rounds=2), Console(file=said, width=200)
    )
    assert set(result["tokens_per_second"]) == {"pipeline", "memory"}
    assert len(result["ratio"]["all"]) == 2
    assert min(result["ratio"]["all"]) <= result["ratio"]["median"] <= max(result["ratio"]["all"])
    assert f"{result['ratio']['median']:.3f}" in said.getvalue()
    written = json.loads((options["out"] / "result.json").read_text())
    assert written["ratio"] == result["ratio"]
    with pytest.raises(ValueError, match="holds a result: pass --overwrite"):
        bench_pipeline.main(bench_pipeline.Config(**options, rounds=2), Console(quiet=True))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"max_steps": 1}, {"max_steps": None}])
def test_turns_that_cannot_be_are_told(options, wrong):
    with pytest.raises(ValueError, match="--rounds is at least 1, and --max-steps at least 2"):
        bench_pipeline.main(bench_pipeline.Config(**options | wrong), Console(quiet=True))


@pytest.mark.parametrize("wrong", [{"resume": True}, {"seeds": 3}])
def test_options_of_trainings_that_are_kept_are_refused(options, wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))} is of a training that is kept"):
        bench_pipeline.main(bench_pipeline.Config(**options | wrong), Console(quiet=True))
