"""Pre-training on a text that is written here, small; its masks, spans, sizes and files."""

import io
import itertools
import json
import os
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import lora_glue, pretrain
from experiments.common.loop import InterruptedRunError
from experiments.common.pretrain_data import prepared
from experiments.common.pretrain_objectives import objective
from experiments.common.pretrain_shown import draw
from experiments.common.pretrain_sizes import FAMILIES, shape_of
from experiments.common.pretrain_spans import (
    longest_window,
)
from experiments.common.pretrain_steps import Pretrainer
from experiments.common.pretrain_tokens import Vocabulary, stream, train_tokenizer, vocabulary_of
from experiments.common.readers import DataError
from experiments.common.tokens import load_tokenizer
from jpeft.hf import load_model
from jpeft.hf.checkpoints import load_bert
from tests.tiny import write_task

# One worker trains the models that most tests look at.
pytestmark = pytest.mark.xdist_group("pretrain")
SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "re", "si", "to", "wu", "sh", "ack")
QUICK = {
    "sizes": ("0.3m",),
    "held_out": 1,
    "vocabulary": 256,
    "length": 32,
    "tokens_per_step": 512,
    "steps": 12,
    "checkpoints": (0, 4),
    "validation_rows": 16,
}
BIG = Vocabulary(8192)


def text(seed, sentences=150):
    """Sentences of made-up words, some of which are common."""
    words = ["".join(w) for w in itertools.product(SYLLABLES, repeat=2)]
    rng = np.random.default_rng(seed)
    chances = 1 / np.arange(1, len(words) + 1)
    lines = [rng.choice(words, 8, p=chances / chances.sum()) for _ in range(sentences)]
    return "\n\n".join(" ".join(line).capitalize() + "." for line in lines)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(4):
        (folder / f"{i}.txt").write_text(text(i))
    return folder


def said(texts, out, **options):
    """Without plots, which take as long as a model."""
    shown = io.StringIO()
    config = pretrain.Config(**{**QUICK, "data": texts, "out": out, **options})
    with mock.patch.object(pretrain, "draw"):
        result = pretrain.main(config, Console(file=shown, width=160))
    return result, shown.getvalue()


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """All families, one size."""
    out = tmp_path_factory.mktemp("out")
    return out, *said(texts, out, families=FAMILIES)


def refused(match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        pretrain.main(pretrain.Config(**{**QUICK, **options}), Console(quiet=True))


# -- a whole run ---------------------------------------------------------------------------------


def test_every_family_learns(trained):
    out, result, shown = trained
    written = json.loads((out / "result.json").read_text())
    assert [m["family"] for m in written["models"]] == list(FAMILIES)
    for model in written["models"]:
        losses = model["validation"]
        assert list(losses) == ["0", "4", "12"]
        # Encoders start from how often words are.
        drawn = model["family"] != "encoder"
        assert losses["0"] == pytest.approx(np.log(256), abs=0.4) if drawn else losses["0"] < 5.2
        assert losses["12"] < losses["4"] < losses["0"]
        assert f"{losses['12']:.4f}" in shown
        assert f"{model['parameters']:,}" in shown
        assert model["steps"] == 12
        folder = out / model["family"] / "0.3m"
        assert not (folder / "checkpoint").exists()
        names = {p.name for p in folder.iterdir() if p.is_dir()}
        assert names == {"step_000000", "step_000004", "step_000012", "model"}
        last, model_ = (folder / n / "model.safetensors" for n in ("step_000012", "model"))
        assert last.read_bytes() == model_.read_bytes()
    rows = 512 // 32
    assert [m["tokens"] for m in written["models"]] == [12 * rows * n for n in (30, 31, 33)]
    assert result["data"]["tokens"]["train"] > result["data"]["tokens"]["validation"]
    assert "4 texts" not in shown
    assert "3 texts, and 1 for validation" in shown


def test_plots(trained, tmp_path):
    pytest.importorskip("matplotlib")
    result = trained[1]
    draw(tmp_path, result, Console(quiet=True))
    names = ("pretrain.png", "pretrain.svg", "pretrain_steps.png", "pretrain_steps.svg")
    assert {p.name for p in tmp_path.iterdir()} == {*names}
    assert "encoder-decoder (token of spans), 0.3m" in (tmp_path / names[3]).read_text()
    draw(tmp_path / "none", {"models": []}, Console(quiet=True))
    assert not (tmp_path / "none").exists()


def test_exports_load_as_any_model(trained):
    out = trained[0]
    for family in FAMILIES:
        folder = out / family / "0.3m" / "model"
        tokenizer = load_tokenizer(folder)
        assert tokenizer.get_vocab_size() == 256
        assert tokenizer.encode("Bade kilo").tokens[0] == "[CLS]"
        if family == "encoder":
            model, report = load_bert(folder, key=jax.random.key(0), pooler=False)
            assert all(n.startswith("cls.predictions.") for n in report.ignored)
        else:
            model, report = load_model(folder)
            assert not report.ignored
            assert model.config.eos_token_id == 3
        assert not report.new
        assert model.config.vocab_size == 256
        rows = (folder / "model.safetensors").stat().st_size
        assert rows < 2.1 * model_parameters(out, family) + 10_000  # bf16


def model_parameters(out, family):
    return json.loads((out / family / "0.3m" / "result.json").read_text())["parameters"]


def test_an_encoder_is_fine_tuned(trained, tmp_path):
    folder = trained[0] / "encoder" / "0.3m" / "model"
    task = write_task(tmp_path / "task")
    result = lora_glue.main(
        lora_glue.Config(
            task="sst2", data=task, model=str(folder), max_steps=2, batch=8, baseline=False
        ),
        Console(quiet=True),
    )
    assert 0 <= result["metrics"]["lora"]["accuracy"]["mean"] <= 1


def test_kept_models_and_more_of_them(texts, trained, tmp_path):
    out, one = tmp_path / "out", {"families": ("decoder",)}
    said(texts, out, **one)
    before = (out / "decoder" / "0.3m" / "result.json").read_bytes()
    refused("finished run: pass --overwrite", data=texts, out=out, **one)
    result, shown = said(texts, out, resume=True, minutes=0.0, families=FAMILIES)
    assert "decoder 0.3m: kept from before" in shown
    assert result["left"] == ["encoder 0.3m", "encoder_decoder 0.3m"]
    assert "no time was left for encoder 0.3m, encoder_decoder 0.3m" in shown
    assert [m["family"] for m in result["models"]] == ["decoder"]
    assert (out / "decoder" / "0.3m" / "result.json").read_bytes() == before
    changed = {"data": texts, "out": out, "resume": True, **one, "steps": 13}
    refused("steps was 12 and is 13", **changed)
    (out / "decoder" / "0.3m" / "step_000000" / "config.json").unlink()
    result, _ = said(None, out, overwrite=True, **one)
    assert (out / "decoder" / "0.3m" / "step_000000" / "config.json").exists()
    assert (out / "decoder" / "0.3m" / "result.json").read_bytes() != before  # another time


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_a_cut_run_ends_as_a_whole_one(family, texts, trained, tmp_path, monkeypatch):
    """A signal at step 5, one step after the last export."""
    out = tmp_path / "out"
    steps = Pretrainer.steps

    def cut(self, state, count):
        state, losses = steps(self, state, count)
        if int(state.step) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return state, losses

    monkeypatch.setattr(Pretrainer, "steps", cut)
    options = {"families": (family,), "call": 1}
    with pytest.raises(InterruptedRunError, match=str(int(signal.SIGTERM))):
        said(texts, out, **options)
    folder = out / family / "0.3m"
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["5"]
    assert not (folder / "result.json").exists()
    refused("unfinished run: pass --resume", data=texts, out=out, **options)
    result, _ = said(texts, out, resume=True, **options)
    whole = next(m for m in trained[1]["models"] if m["family"] == family)
    assert result["models"][0]["validation"] == whole["validation"]
    for name in ("step_000004", "step_000012", "model"):
        files = [o / family / "0.3m" / name / "model.safetensors" for o in (out, trained[0])]
        assert files[0].read_bytes() == files[1].read_bytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [s for s in map(json.loads, lines) if "loss" in s][-1]["step"] == 12
    assert [json.loads(x)["step"] for x in lines if "tokens" in x] == list(range(1, 13))
    assert not (folder / "checkpoint").exists()


# -- the compiled steps --------------------------------------------------------------------------


def test_no_text_is_lost():
    texts = [text(i) for i in range(3)] + ["Bade lo", "ki\n\n\nwusi  tona\n"]
    tokenizer = train_tokenizer(texts, 256)
    v = vocabulary_of(tokenizer)
    assert v.size == 256
    tokens = stream(tokenizer, texts, v.end)
    assert tokens.dtype == np.uint16
    assert tokens[-1] == v.end
    parts = np.split(tokens, np.flatnonzero(tokens == v.end) + 1)[:-1]
    assert len(parts) == len(texts)
    for part, whole in zip(parts, texts, strict=True):
        ids = tokenizer.encode(" ".join(whole.split()), add_special_tokens=False).ids
        assert part.tolist() == [*ids, v.end]
    sentinels = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(100)]
    assert sentinels == [v.sentinel(i) for i in range(100)] == list(range(255, 155, -1))
    assert v.ordinary == (5, 156)


def test_tokens_are_made_once(texts, tmp_path):
    options = {"vocabulary": 256, "held_out": 1, "length": 32, "seed": 0}
    options |= {"console": Console(quiet=True)}
    kept = tmp_path / "kept"
    first = prepared(texts, kept, **options)
    stamp = (kept / "tokens.safetensors").stat().st_mtime_ns
    for source in (texts, None, kept):
        again = prepared(source, kept, **options)
        np.testing.assert_array_equal(again.train, first.train)
    there = prepared(kept, tmp_path / "other", **options)
    assert there.folder == kept
    assert not (tmp_path / "other").exists()
    assert (kept / "tokens.safetensors").stat().st_mtime_ns == stamp
    assert first.about["validation"][0] in {p.name for p in texts.iterdir()}
    with pytest.raises(DataError, match="pass another --out"):
        prepared(texts, kept, **{**options, "vocabulary": 300})
    with pytest.raises(ValueError, match="--vocabulary 60: at least 110"):
        prepared(texts, tmp_path / "third", **{**options, "vocabulary": 60})


@pytest.mark.interop
def test_transformers_reads_every_family(trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = np.random.default_rng(0).integers(5, 150, (2, 12))
    theirs, ours = torch.tensor(ids), jnp.asarray(ids)
    options = {"output_loading_info": True}

    def close(a, b):
        np.testing.assert_allclose(np.asarray(a), b.detach().float().numpy(), atol=2e-5)

    def opened(kind, folder):
        model, info = kind.from_pretrained(folder, **options)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.float().eval()

    folder = trained[0] / "encoder" / "0.3m" / "model"
    bert, _ = load_bert(folder, key=jax.random.key(0), pooler=False)
    model = opened(transformers.BertForMaskedLM, folder)
    close(jax.jit(bert.__call__)(ours), model.bert(theirs).last_hidden_state)
    shape = shape_of("encoder", "0.3m")
    made = objective("encoder", shape, Vocabulary(256), 32, jnp.float32, 0)
    close(mlm_logits(made.model, folder, ours), model(theirs).logits)

    folder = trained[0] / "decoder" / "0.3m" / "model"
    found = jax.jit(load_model(folder)[0].__call__)(ours)
    close(found, opened(transformers.LlamaForCausalLM, folder)(theirs).logits)

    folder = trained[0] / "encoder_decoder" / "0.3m" / "model"
    model = opened(transformers.T5ForConditionalGeneration, folder)
    found = jax.jit(load_model(folder)[0].__call__)(ours, decoder_input_ids=ours[:, :5])
    close(found, model(input_ids=theirs, decoder_input_ids=theirs[:, :5]).logits)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Bade lomu, <extra_id_0> Kilo."
    assert tokenizer(text).input_ids == load_tokenizer(folder).encode(text).ids
    assert tokenizer.mask_token_id == 4
    assert tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 3


def mlm_logits(model, folder, ids):
    """The logits of the module that was trained, with the weights of a file."""
    from experiments.common.pretrain_head import FAMILY
    from jpeft.functional import functional
    from jpeft.hf.params import load_params

    apply, params = functional(model)
    like = jax.eval_shape(lambda: params)
    return jax.jit(apply)(load_params(folder, like, FAMILY)[0], ids)


# -- what a user may get wrong -------------------------------------------------------------------


def test_wrong_options(texts, tmp_path):
    out = tmp_path / "out"
    ready = {"data": texts, "out": out}
    refused("--out is missing", data=texts)
    refused("--data is missing", DataError, out=out)
    refused("--sizes 4M: there are 0.3m, .*did you mean '4m'", **{**ready, "sizes": ("4M",)})
    refused("each once", **{**ready, "sizes": ("1m", "1m")})
    refused("each once", **ready, families=())
    refused("--steps 1: at least 2", **{**ready, "steps": 1})
    refused("--tokens-per-step 16: at least 32", **{**ready, "tokens_per_step": 16})
    refused("--call 0", **ready, call=0)
    refused("--checkpoints 13: from 0 to the 12", **{**ready, "checkpoints": (13,)})
    refused("no such folder", DataError, out=out, data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds 0 texts", DataError, out=out, data=tmp_path / "empty")
    refused("--held-out 0", DataError, **{**ready, "held_out": 0})
    assert not out.exists()
    short = tmp_path / "short"
    short.mkdir()
    for i in range(2):
        (short / f"{i}.txt").write_text("A ship. " * 3)
    refused("tokens, and a row is of 30", out=out, data=short)
    with pytest.raises(ValueError, match="at least 8"):
        objective("encoder", shape_of("encoder", "0.3m"), BIG, 4, jnp.float32, 0)
    with pytest.raises(ValueError, match="no room for a span"):
        longest_window(2)
    with pytest.raises(ValueError, match="sentinels"):
        longest_window(4000)


def test_a_folder_of_tokens_that_is_not_whole(texts, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    refused("without tokens.safetensors", DataError, data=tmp_path, out=tmp_path / "out")


def test_tokens_of_another_make(tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="not one that this experiment made"):
        vocabulary_of(Tokenizer(models.WordPiece({"[PAD]": 0}, unk_token="[PAD]")))
