"""The walk through four devices, on a small stack."""

import dataclasses
import importlib.util
import io
import json

import pytest
from rich.console import Console

from experiments.zero import Config, main, share

SMALL = Config(width=1024, layers=2, rows=2048, devices=(1, 4), stages=(0, 3))


def test_shares_are_theory():
    """Stage 1 shares the optimiser's state, 2 gradients too, 3 parameters too."""
    whole = share(SMALL, 0, 4)
    assert whole == share(SMALL, 3, 1)
    for stage, shared in ((1, ["optimiser"]), (2, ["optimiser", "gradients"]), (3, list(whole))):
        got = share(SMALL, stage, 4)
        for kind, n in whole.items():
            assert got[kind] == pytest.approx(n / 4 if kind in shared else n, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"devices": (1, 0)}, "--devices 0"),
        ({"layers": 0}, "--layers 0"),
        ({"width": 0}, "--width 0"),
        ({"rows": -4}, "--rows -4"),
    ],
)
def test_what_counts_nothing_is_told(wrong, told):
    with pytest.raises(ValueError, match=f"{told}: at least 1"):
        main(dataclasses.replace(SMALL, **wrong))


needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"
)


@needs_tpu_compiler
def test_a_topology_of_other_than_four_is_told():
    with pytest.raises(ValueError, match="--topology v5e:2x4 has 8 devices: the step is of 4"):
        main(dataclasses.replace(SMALL, topology="v5e:2x4"))


def test_the_table_is_of_four_devices_whichever_are_asked_for():
    config = dataclasses.replace(SMALL, stages=(), devices=(1, 8))
    said = io.StringIO()
    result = main(config, Console(file=said))
    assert set(result["shares"]["3"]) == {"1", "4", "8"}
    assert "MiB on each of 4 devices" in said.getvalue()


@pytest.mark.slow
@needs_tpu_compiler
def test_the_walk(tmp_path):
    said = io.StringIO()
    result = main(dataclasses.replace(SMALL, out=tmp_path / "o"), Console(file=said))
    walks = {s: [(m["layer"], m["what"]) for m in w["moments"]] for s, w in result["walks"].items()}
    for layer in ("M0 forward", "M1 forward", "M1 backward", "M0 backward"):
        assert sum(x == (layer, "gather") for x in walks["3"]) in (1, 2)  # up and down
    assert not any(what == "gather" and layer for layer, what in walks["0"])
    for s in walks.values():
        assert any(what == "reduce" for _, what in s)
    assert json.loads((tmp_path / "o" / "result.json").read_text())["walks"] == result["walks"]
    for name in ("shares", "step_stage0", "step_stage3"):
        assert (tmp_path / "o" / f"{name}.png").is_file()
    with pytest.raises(ValueError, match="pass --overwrite"):
        main(dataclasses.replace(SMALL, out=tmp_path / "o"), Console(file=said))
