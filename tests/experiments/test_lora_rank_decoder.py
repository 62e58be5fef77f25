"""LoRA's rank and weights on a decoder that writes answers, in miniature."""

import dataclasses
import importlib.util
import io
import json

import pytest
from rich.console import Console

from experiments import finetune
from experiments.lora_rank_decoder import Config, main, runs_of

pytestmark = pytest.mark.slow  # a real run trains four times

SMALL = Config(
    max_steps=3,
    batch=8,
    held_out=16,
    generate=0,
    length=128,
    buckets=1,
    ranks=(1, 2),
    weights=("q", "q,v"),
)


def run(**options):
    said = io.StringIO()
    result = main(dataclasses.replace(SMALL, **options), Console(file=said, width=120))
    return result, said.getvalue()


def test_ranks_and_weights_on_the_sample(tmp_path):
    result, said = run(out=tmp_path, seeds=1)
    assert list(result["scores"]) == ["q", "q,v"]
    trained = result["trained"]
    assert trained["q_r2"] == 2 * trained["q_r1"] < trained["qv_r2"]
    for by in result["scores"].values():
        for found in by.values():
            assert found["loss"]["mean"] < result["loss_before"]  # it learned
    assert result["metric"] == "loss"
    assert "loss" in said
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == result["scores"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "lora_rank.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="holds a finished run"):
        run(out=tmp_path)
    again, said = run(out=tmp_path, resume=True)
    assert again["scores"] == result["scores"]
    assert said.count("kept from before") == 4


def test_answers_are_scored_by_seed(tmp_path, monkeypatch):
    def pretend(config, console):
        right = 10.0 * config.rank + config.seed + 100 * (len(config.targets[0]) > 15) / 4
        return {
            "held_out": {"loss": 1 / config.rank, "loss_before": 2.0}, "scores": {"exact": right},
            "trained": config.rank, "data": "sample", "steps": 3, "wall_seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(finetune, "main", pretend)
    result, said = run(seeds=2, generate=5)
    assert result["metric"] == "exact"
    assert result["scores"]["q"]["2"]["exact"]["values"] == [0.2, 0.21]
    assert "paper, WikiSQL" in said
    assert "20.5%" in said


def test_every_run_is_one_of_finetune():
    runs = runs_of(dataclasses.replace(SMALL, seeds=2, weights=("q,k,v,o",)))
    assert list(runs) == [f"qkvo_r{r}_seed{s}" for r in (1, 2) for s in (0, 1)]
    last = runs["qkvo_r2_seed1"]
    assert (last.method, last.rank, last.alpha, last.seed) == ("lora", 2, 4.0, 1)
    assert last.targets == (r"[qkvo]_proj/kernel$",)
    assert last.max_steps == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 4}, "--rank is set by this experiment.*use --ranks"),
        ({"seed": 1}, "use --seeds"),
        ({"method": "full"}, "use finetune"),
        ({"weights": ("q,k",)}, "--weights q,k: there are q, q,v, q,k,v,o"),
        ({"ranks": ()}, "--ranks: one or more"),
        ({"ranks": (0,)}, "--ranks 0: at least 1"),
        ({"ranks": (1, 65)}, "rank 65 is above the size"),
        ({"processes": 2}, "--processes needs --out"),
    ],
)
def test_refusals(options, told):
    with pytest.raises(ValueError, match=told):
        run(**options)
