"""The step's time against its sizes, in miniature."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from experiments.common.peer_flops import products, step_flops
from experiments.step_cost import Config, main, shape, slope

SMALL = Config(
    width=64,
    vocabulary=64,
    layers=1,
    sequence=16,
    batch=2,
    rank=2,
    many_layers=(1, 2),
    sequences=(16, 32),
    batches=(2, 4),
    ranks=(2, 4),
    rounds=2,
)


def test_four_slopes_and_their_plots(tmp_path):
    pytest.importorskip("matplotlib")
    console = Console(file=io.StringIO(), width=120)
    result = main(dataclasses.replace(SMALL, out=tmp_path), console)
    assert list(result["axes"]) == ["layers", "sequence", "batch", "rank"]
    for name, found in result["axes"].items():
        times = [r["ms"] for r in found["values"].values()]
        assert len(times) == 2
        assert min(times) > 0
        low, high = found["slope_range"]
        assert low <= found["slope"] <= high
        assert (tmp_path / f"step_cost_{name}.png").stat().st_size > 0
    # Rows cost the same each, tokens of a row more; layers less: the head stays. Ranks cost little.
    theory = {name: found["theory"] for name, found in result["axes"].items()}
    assert theory["batch"] == pytest.approx(1)
    assert theory["sequence"] > 1 > theory["layers"] > theory["rank"] > 0
    assert json.loads((tmp_path / "result.json").read_text())["axes"] == result["axes"]
    assert "slope by rank" in console.file.getvalue()


def test_the_count_is_the_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shape(SMALL)))
    p = products(tmp_path)
    layer = 2 * (4 * 64 * 64 + 3 * 64 * 176)
    assert step_flops(p, "full", 16) == 3 * (layer + 4 * 16 * 64 + 2 * 64 * 64)
    more = step_flops(p, "lora", 16, 4) - step_flops(p, "lora", 16, 2)
    assert more == 3 * 2 * 2 * 2 * (64 + 64)  # two more ranks of two matrices


def test_a_slope():
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert slope([1, 10], [5, 5]) == pytest.approx(0)


def test_full_has_no_rank():
    assert "rank" not in dataclasses.replace(SMALL, method="full").values()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranks": (8,)}, "a slope takes two or more rank of LoRA"),
        ({"batches": (0, 2)}, "of 1 and up"),
        ({"width": 100}, "a multiple of 64"),
        ({"rounds": 0}, "--rounds at least 1"),
    ],
)
def test_refusals(options, told):
    with pytest.raises(ValueError, match=told):
        main(dataclasses.replace(SMALL, **options))
