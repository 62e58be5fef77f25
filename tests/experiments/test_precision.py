"""Full fine-tuning in four precisions, on a tiny model."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from experiments.precision import RUNS, Config, main
from tests.tiny import write_model, write_task


def test_small_updates_are_lost_without_masters(tmp_path):
    config = Config(
        task="sst2",
        data=write_task(tmp_path / "data"),
        model=str(write_model(tmp_path / "model")),
        steps=21,
        batch=8,
        lr=1e-5,
        out=tmp_path / "out",
    )
    said = io.StringIO()
    rows = main(config, Console(file=said, width=120))["rows"]
    assert set(rows) == set(RUNS)
    assert rows["mixed"]["moved"] > 0.8  # of the numbers that have a gradient
    assert rows["mixed"]["moved"] == pytest.approx(rows["float32"]["moved"], abs=0.05)
    assert rows["bfloat16 alone"]["moved"] < 0.5 * rows["mixed"]["moved"]
    assert 0 < rows["stochastic"]["moved"] < rows["mixed"]["moved"]
    assert rows["mixed"]["over_float32"] == pytest.approx(1, abs=0.01)
    assert "moved a step" in said.getvalue()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rows"] == rows
    with pytest.raises(ValueError, match="holds a result: pass --overwrite"):
        main(config)
    fresh = dataclasses.replace(config, out=None)
    for wrong in ({"steps": 0}, {"batch": 0}, {"length": 0}, {"lr": math.nan}, {"lr": -1.0}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"--{name} {value}: "):
            main(dataclasses.replace(fresh, **wrong))
