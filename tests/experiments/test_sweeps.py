"""The experiments of many runs, on a tiny model and a tiny task."""

import dataclasses
import importlib.util
import io
import json
import pathlib

import jax
import pytest
from rich.console import Console

import jpeft
from experiments import (
    adapter_size,
    compare_methods,
    dylora,
    intrinsic_dimension,
    lora_glue,
    lora_plus,
    lora_rank,
    prompt_tuning,
)
from experiments.common.loop import InterruptedRunError
from experiments.common.methods import METHODS
from experiments.common.pipeline import Batches
from tests.tiny import write_model, write_task

pytestmark = pytest.mark.slow  # every one runs many trainings


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Options that make any experiment small, and layers in a loop, which compiles faster."""
    monkeypatch.setattr(lora_glue, "machine_layout", dict)
    return {
        "model": str(write_model(tmp_path / "model")),
        "data": write_task(tmp_path / "task"),
        "out": tmp_path / "out",
        "task": "sst2",
        "epochs": 1,
        "batch": 8,
        "length": 12,
        "buckets": 1,
        "bottleneck": 4,
        "prompt": 3,
        "dimensions": 40,
        "rank": 2,
        "top": 1,
        "words": (5, 18),
    }


def run(module, options, **more):
    said = io.StringIO()
    fields = {f.name for f in dataclasses.fields(module.Config)}
    options = {k: v for k, v in (options | more).items() if k in fields}
    result = module.main(module.Config(**options), Console(file=said, width=140))
    return result, said.getvalue()


def without(options, *names):
    return {k: v for k, v in options.items() if k not in names}


def has_plot(options, name):
    png, svg = (options["out"] / f"{name}.{kind}" for kind in ("png", "svg"))
    return png.stat().st_size > 5000 and "<svg" in svg.read_text()


def test_methods_train_and_are_compared(made):
    methods = ("full", "head", "lora", "prompt", "said")
    result, said = run(compare_methods, made, methods=methods, max_steps=3)
    assert set(result["rows"]) == set(methods)
    for method, row in result["rows"].items():
        assert method in said
        assert row["trained"] > 0
        assert row["steps"] == 3
        assert 0 <= row["mean"] <= 1
        assert row["memory_mib"] > 0
    trained = {m: r["trained"] for m, r in result["rows"].items()}
    assert trained["head"] < trained["lora"] < trained["full"]
    assert trained["said"] == 40
    if importlib.util.find_spec("matplotlib"):
        assert has_plot(made, "compare_methods")
    else:
        assert "no plot: it needs the extra" in said
    on_disk = json.loads((made["out"] / "result.json").read_text())
    assert on_disk["rows"].keys() == result["rows"].keys()
    assert not list(made["out"].glob("runs/*/seed0/checkpoint"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_step(method, made):
    """Traced, not compiled: what compiled steps do is looked at above, and with the methods."""
    fields = {f.name for f in dataclasses.fields(lora_glue.Config)} - {"out"}
    options = {k: v for k, v in made.items() if k in fields}
    config = lora_glue.Config(**options, method=method)
    directory = pathlib.Path(config.model)
    prepared = lora_glue.prepare(config, directory)
    model = lora_glue.build(config, directory, 2, 0)
    trainer = lora_glue.trainer_of(config, model, 0, 5)
    state = trainer.step.abstract(jax.eval_shape(trainer.first, jpeft.functional(model)[1]))
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert trained == 40 if method in ("subspace", "said") else trained > 0
    batch = next(iter(Batches(prepared.train, prepared.train_shapes, prepared.pad, 0)))
    after, metrics = trainer.step.trace(state, trainer.frozen, batch, trainer.key(0)).out_info
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert set(metrics) == {"loss", "grad_norm", "skipped"}


def test_a_cut_sweep_goes_on(made, monkeypatch):
    methods = ("head", "ia3", "bitfit")
    done = []
    real = lora_glue.run_seed

    def interrupted(config, *rest):
        if config.method == "ia3" and "ia3" not in done:
            done.append("ia3")
            raise InterruptedRunError
        done.append(f"{config.method} ran")
        return real(config, *rest)

    monkeypatch.setattr(lora_glue, "run_seed", interrupted)
    with pytest.raises(InterruptedRunError):
        run(compare_methods, made, methods=methods)
    with pytest.raises(ValueError, match="unfinished run: pass --resume"):
        run(compare_methods, made, methods=methods)
    result, said = run(compare_methods, made, methods=methods, resume=True)
    assert "kept from before" in said
    assert done == ["head ran", "ia3", "ia3 ran", "bitfit ran"]
    assert set(result["rows"]) == set(methods)


def test_what_an_experiment_sets_itself_is_refused(made):
    with pytest.raises(ValueError, match="--method is set by this experiment.*use --methods"):
        run(compare_methods, made, method="full")
    with pytest.raises(ValueError, match="--weights qkv: there are q, q,v, q,k,v,o"):
        run(lora_rank, without(made, "rank"), weights=("qkv",))
    assert not made["out"].exists()


def test_lora_rank(made):
    options = without(made, "rank")
    result, said = run(lora_rank, options, ranks=(1, 2), weights=("q", "q,k,v,o"))
    trained = {n: r["seeds"][0]["trained"] for n, r in result["runs"].items()}
    assert trained["q_r1"] < trained["q_r2"] < trained["qkvo_r2"]
    assert "73.8" in said  # the paper's row
    assert set(result["scores"]) == {"q", "q,k,v,o"}


def test_adapter_size(made):
    options = without(made, "task", "bottleneck", "top")
    result, said = run(adapter_size, options, tasks=("sst2",), sizes=(1, 4), layers=(1,), seeds=2)
    adapters, top = result["points"]["adapter"], result["points"]["top"]
    assert adapters[0]["trained"] < adapters[1]["trained"]
    assert top[0]["trained"] > adapters[1]["trained"]
    assert adapters[0]["p20"] <= adapters[0]["p50"] <= adapters[0]["p80"]
    assert "adapters of 4" in said


def test_prompt_tuning(made):
    options = without(made, "prompt")
    result, said = run(prompt_tuning, options, lengths=(2,))
    assert set(result["scores"]) == {"uniform", "vocabulary"}
    assert result["one_batch"]["tasks"] == 2
    assert result["one_batch"]["largest_difference"] < 1e-4
    assert "2 prompts in one batch" in said


def test_intrinsic_dimension(made):
    options = without(made, "dimensions")
    result, said = run(intrinsic_dimension, options, dims=(20,))
    assert set(result["scores"]["SAID"]) == {"20"}
    assert result["runs"]["SAID_20"]["seeds"][0]["trained"] == 20
    for kind in ("DID", "SAID"):
        scores = {int(d): s["mean"] for d, s in result["scores"][kind].items()}
        reached = [d for d, s in sorted(scores.items()) if s >= 0.9 * result["full"]["mean"]]
        assert result["d90"][kind] == (reached[0] if reached else None)
    assert "1,861" in said


def test_lora_plus(made):
    # A rate at which five steps move a loss of five digits.
    result, said = run(lora_plus, made, ratios=(1.0, 16.0), window=1, lr=0.03)
    assert len(result["rows"]["16"]["curve"]) == 5
    assert result["rows"]["16"]["curves"] == [result["rows"]["16"]["curve"]]
    assert result["rows"]["1"]["curve"][0] == result["rows"]["16"]["curve"][0]
    assert abs(result["rows"]["1"]["curve"][-1] - result["rows"]["16"]["curve"][-1]) > 1e-3
    assert "ratio" in said


def test_dylora(made):
    result, said = run(dylora, made, rank=2)
    for by in result["scores"].values():
        assert set(by) == {"1", "2"}
    one_run, apart, cut = result["scores"].values()
    assert one_run["2"] == result["runs"]["dylora"]["metrics"]["dylora"]["accuracy"]
    assert cut["2"] == apart["2"]
    seeds = result["runs"]["dylora"]["seeds"]
    assert result["seconds"]["dylora"] == sum(s["steps"] * s["step_seconds"] for s in seeds)
    assert "times as long" in said
