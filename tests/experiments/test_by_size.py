"""Encoders of several sizes: names, d90 by mean and by seed, what is left out, wrong models."""

import importlib.util
import io
import json
import pathlib
import shutil

import pytest
from flax import nnx
from rich.console import Console

from experiments import by_size
from experiments.common.family import member, members
from experiments.common.models import ModelError
from experiments.common.report_command import command_of
from experiments.common.report_read import Result
from jpeft.hf import CheckpointError, save_model
from jpeft.models.llama import Llama, LlamaConfig
from tests.experiments.pretended import pretend
from tests.tiny import write_model, write_task

pytestmark = pytest.mark.slow  # a real run trains a few times


@pytest.fixture
def family(tmp_path):
    """Two checkpoints of one size, the later as `pretrain` leaves the end, and another model."""
    size = tmp_path / "encoder" / "0.1m"
    for name in ("step_000064", "model"):
        write_model(size / name)
    (size / "result.json").write_text(json.dumps({"family": "encoder", "steps": 256}))
    other = write_model(tmp_path / "other-bert")
    return [str(size / "model"), str(size / "step_000064"), str(other)]


@pytest.fixture
def made(tmp_path):
    """Options of small runs."""
    return {
        "data": write_task(tmp_path / "task"),
        "out": tmp_path / "out",
        "task": "sst2",
        "epochs": 1,
        "batch": 8,
        "length": 8,
        "prompt": 3,
        "words": (5, 18),
    }


def run(**options):
    said = io.StringIO()
    result = by_size.main(by_size.Config(**options), Console(file=said, width=200))
    return result, said.getvalue()


def test_names_sizes_and_steps(family):
    found = members(family, Console(file=io.StringIO()))
    assert [(m.family, m.size, m.step) for m in found] == [
        ("bert", "other-bert", None),
        ("encoder", "0.1m", 64),
        ("encoder", "0.1m", 256),
    ]
    assert found[2].label == "encoder_0.1m_step256"
    # Embeddings of 18 words, 24 positions and 2 segments, their norm, and two layers.
    layer = 4 * (16 * 16 + 16) + 16 * 24 + 24 + 24 * 16 + 16 + 4 * 16
    assert found[0].parameters == 16 * (18 + 24 + 2) + 32 + 2 * layer
    said = io.StringIO()
    last = pathlib.Path(shutil.copytree(family[0], pathlib.Path(family[0]).parent / "step_000256"))
    assert len(members([*family, str(last)], Console(file=said, width=500))) == 3
    assert "are one model: taken once" in said.getvalue()
    (pathlib.Path(family[0]).parent / "result.json").unlink()
    assert member("model", pathlib.Path(family[0])).step is None


def test_d90_by_size_and_along_training(family, made, monkeypatch):
    def score(config, seed):
        if config.method == "full":
            return 1.0
        better = 0.1 * ("step" not in config.model)
        reached = config.dimensions >= (40 if seed else 20) - 20 * ("other" in config.model)
        return 0.91 + better - 0.1 if reached else 0.6

    seen = pretend(monkeypatch, score)
    result, said = run(
        **made, models=tuple(family), dims=(20, 40), seeds=2, full_epochs=3, lr=0.3, full_lr=0.01
    )
    other, early, late = result["models"]
    assert (early["step"], late["step"], other["family"]) == (64, 256, "bert")
    assert early["d90"] == {"DID": None, "SAID": None}
    assert early["d90_seeds"]["SAID"] == [None, None]
    assert late["d90"]["DID"] == 40  # at 20 the mean is below the mark
    assert late["d90_seeds"]["DID"] == [20, 40]
    assert other["d90"]["SAID"] == 20
    assert late["scores"]["SAID"]["20"]["values"] == [pytest.approx(0.91), 0.6]
    assert late["full"] == {"mean": 1.0, "std": 0.0, "values": [1.0, 1.0]}
    assert (result["metric"], result["constant"]) == ("accuracy", 0.5)
    full, did = seen["encoder_0.1m_step64_full"], seen["encoder_0.1m_step64_DID_20"]
    assert (full.epochs, full.lr, did.epochs, did.lr) == (3, 0.01, 1, 0.3)
    assert "> 40" in said
    told = command_of(Result("by_size/x", made["out"], result, ()))
    assert told.startswith("python -m experiments.by_size --task sst2 --data DIR ")
    assert "--models MODELS/encoder/0.1m/model " in told
    assert told.endswith("--out docs/results/by_size/x")
    written = (made["out"] / "result.json").read_text()
    assert str(made["out"].parent) not in written
    assert json.loads(written)["models"] == result["models"]
    if importlib.util.find_spec("matplotlib"):
        for name in ("d90_by_size", "d90_by_step_DID", "d90_by_step_SAID"):
            assert (made["out"] / f"{name}.png").stat().st_size > 5000


def test_methods_by_size(family, made, monkeypatch):
    seen = pretend(monkeypatch, lambda config, seed: 0.8 + 0.01 * seed)
    result, said = run(
        **made, kind="methods", models=tuple(family[::2]), lengths=(1, 3, 20), seeds=3
    )
    for m in result["models"]:
        assert list(m["scores"]) == ["full", "fixed_prompt", "prompt_1", "prompt_3", "prefix"]
        assert m["scores"]["prefix"]["values"] == [0.8, 0.81, 0.8 + 0.02]
    assert "a prompt of 20 is left out, since 4 of the 24 tokens" in said
    methods = {n.rpartition("256_")[2]: (c.method, c.prompt) for n, c in seen.items()}
    assert methods["fixed_prompt"] == ("head", 3)
    assert methods["prompt_1"] == ("prompt", 1)
    if importlib.util.find_spec("matplotlib"):
        assert (made["out"] / "methods_by_size.png").stat().st_size > 5000


def test_lora_plus_by_width(family, made, monkeypatch):
    def losses(config, seed):
        pace = 1 + 0.2 * config.lora_plus
        return [1 / (1 + pace * i + seed) for i in range(12)]

    seen = pretend(monkeypatch, lambda config, seed: 0.7, losses)
    made |= {"kind": "lora_plus", "seeds": 2, "ratios": (1, 4), "window": 3}
    result, said = run(**made, models=(family[0],))
    (m,) = result["models"]
    assert m["width"] == 16
    assert list(m["ratios"]) == ["1", "4"]
    plain, fast = m["ratios"].values()
    assert plain["steps"] == [12, 12]  # its own last loss, at its end
    assert all(3 <= n < 12 for n in fast["steps"])
    assert [len(c) for c in fast["curves"]] == [4, 4]
    assert fast["last_loss"]["mean"] < plain["last_loss"]["mean"]
    chosen = {n.rpartition("256_")[2]: (c.method, c.lora_plus) for n, c in seen.items()}
    assert chosen == {"ratio_1": ("lora", 1), "ratio_4": ("lora", 4)}
    assert "steps to ratio 1's last loss" in said
    if importlib.util.find_spec("matplotlib"):
        assert (made["out"] / "lora_plus_by_width.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="1 is what the others are held against"):
        run(**made | {"ratios": (4, 16)}, models=(family[0],))
    with pytest.raises(ValueError, match="--window 20: a run has 5 steps"):
        run(**made | {"window": 20, "overwrite": True}, models=(family[0],))
    assert (made["out"] / "result.json").exists()
    again, _ = run(**made | {"window": 4, "resume": True}, models=(family[0],))
    assert [len(c) for c in again["models"][0]["ratios"]["4"]["curves"]] == [3, 3]


def test_a_real_run(family, made):
    result, _ = run(**made, kind="methods", models=(family[0],), lengths=())
    (m,) = result["models"]
    assert list(m["scores"]) == ["full", "fixed_prompt", "prefix"]
    assert all(0 <= s["mean"] <= 1 for s in m["scores"].values())
    assert result["constant"] == 0.5
    assert (made["out"] / "runs" / "encoder_0.1m_step256_prefix" / "seed0").is_dir()
    with pytest.raises(ValueError, match="holds a finished run"):
        run(**made, kind="methods", models=(family[0],), lengths=())


def test_models_and_dimensions_are_added(family, made, monkeypatch):
    seen = pretend(monkeypatch, lambda config, seed: 0.6)
    run(**made, models=(family[0],), dims=(20,))
    seen.clear()
    result, said = run(**made, models=tuple(family[:2]), dims=(20, 40), resume=True)
    assert [m["step"] for m in result["models"]] == [64, 256]
    assert "kept from before" in said
    assert "encoder_0.1m_step256_full" not in seen
    assert {"encoder_0.1m_step256_DID_40", "encoder_0.1m_step64_full"} <= seen.keys()
    other = made["out"].parent / "elsewhere" / "encoder"
    shutil.copytree(made["out"].parent / "encoder", other)
    with pytest.raises(ValueError, match="is of .*use another --out"):
        run(**made, models=(str(other / "0.1m" / "model"),), dims=(20,), resume=True)


def test_dimensions_beyond_the_parameters_are_left_out(family, made, monkeypatch):
    pretend(monkeypatch, lambda config, seed: 0.6)
    result, said = run(**made, models=(family[0],), dims=(20, 10**6))
    assert list(result["models"][0]["scores"]["DID"]) == ["20"]
    assert result["models"][0]["d90"] == {"DID": 20, "SAID": 20}
    assert "dimensions beyond its parameters are left out" in said
    assert "the largest class alone has accuracy 0.5000" not in said
    with pytest.raises(ValueError, match="--dims: encoder 0.1m, step 256 has .* parameters alone"):
        run(**made | {"overwrite": True}, models=(family[0],), dims=(10**6,))
    pretend(monkeypatch, lambda config, seed: 0.5)
    _, said = run(**made | {"overwrite": True}, models=(family[0],), dims=(20,))
    assert "encoder 0.1m, step 256: note: answering the largest class alone" in said


def test_wrong_models_are_told_before_anything_runs(family, made, tmp_path):
    decoder = LlamaConfig(
        vocab_size=18, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    save_model(Llama(decoder, rngs=nnx.Rngs(0)), tmp_path / "decoder")
    with pytest.raises(CheckpointError, match="decoder: .*of type 'llama'.*encoders are what"):
        run(**made, models=(family[0], str(tmp_path / "decoder")))
    with pytest.raises(ModelError, match="no such directory"):
        run(**made, models=(str(tmp_path / "a" / "b" / "c"),))
    twin = tmp_path / "twin" / "encoder" / "0.1m" / "step_256"
    shutil.copytree(family[0], twin)
    with pytest.raises(ValueError, match="are both encoder 0.1m, step 256"):
        run(**made, models=(family[0], str(twin)))
    with pytest.raises(ValueError, match="--model is set by this experiment.*use --models"):
        run(**made, model=family[0])
    with pytest.raises(ValueError, match="--lr is set by this experiment"):
        run(**made, kind="methods", lr=0.1)
    with pytest.raises(ValueError, match="at least one"):
        run(**made, models=())
    assert not made["out"].exists()
