"""In-context learning: prompts, labels' likelihoods, few-shot LoRA, and the whole command."""

import dataclasses
import importlib.util
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jpeft
from experiments import in_context
from experiments.common import in_context_runs, shots
from experiments.common.decoders import Loaded
from experiments.common.few_shot import FewShot
from experiments.common.label_scores import Scorer, lengths
from experiments.common.methods import Recipe, Sizes
from experiments.common.models import ModelError
from experiments.common.readers import Row
from experiments.common.shots import Prompt
from experiments.common.tasks import TASKS
from experiments.common.texts import byte_codec
from experiments.common.wordings import WORDINGS, Wording
from jpeft.hf import CheckpointError, save_model
from jpeft.hf.models import LLAMA
from jpeft.models.llama import Llama, LlamaConfig
from jpeft.models.t5 import T5
from jpeft.models.t5_config import T5Config
from tests.tiny import WORDS, write_model, write_task

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ".", "it", "in", "all", "they", "thought"]
VOCABULARY += ["that", "terrible", "review", "sentiment", "negative", "positive", "this", ":", ","]
ROWS = [Row((f"text {i}",), i % 3) for i in range(30)]


def tiny(context: int = 48) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip


def write_decoder(folder, context: int = 48):
    """A decoder over words, as `pretrain` leaves one."""
    save_model(Llama(tiny(context), rngs=nnx.Rngs(0)), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def test_every_task_with_labels_has_wordings():
    for name, task in TASKS.items():
        assert (name in WORDINGS) == bool(task.labels)
        for wording in WORDINGS.get(name, ()):
            assert len(wording.words) == len(task.labels) == len({*wording.words})
            text = wording.text([f"<{i}>" for i in range(len(task.text))], 1)
            assert all(f"<{i}>" in text for i in range(len(task.text)))
            assert text.endswith(f" {wording.words[1]}")
    assert all(len({w.pattern for w in each}) >= 4 for each in WORDINGS.values())


def test_a_query_ends_where_labels_part():
    codec = byte_codec()
    found = shots.query(Row(("a {b}",), 0), Wording("{0} is", ("good", "great", "g")), codec)
    assert codec.decode(found.ids) == "a {b} is "
    assert [codec.decode(x) for x in found.labels] == ["good", "great", "g"]
    assert shots.tokens_of(found) == len("a {b} is ") + 4
    row = Row(("no",), 1)
    shown = shots.after(found, [row], Wording("{0} is", ("bad", "good", "odd")), codec)
    assert codec.decode(shown.ids) == "no is good.\na {b} is "
    assert shown.ids[0] == codec.first[0]


def test_demonstrations_are_balanced_ordered_and_mislabelled():
    for k in (1, 4, 6):
        rows = shots.drawn(ROWS, k, 3, seed=5)
        counts = np.bincount([int(r.label) for r in rows], minlength=3)
        assert counts.max() - counts.min() <= 1
        assert len({r.texts for r in rows}) == k
        assert rows == shots.drawn(ROWS, k, 3, seed=5) != shots.drawn(ROWS, k, 3, seed=6)
    assert shots.drawn(ROWS, 33, 3, seed=0) is None
    four = shots.drawn(ROWS, 3, 3, seed=0)
    assert len({tuple(r.texts for r in o) for o in shots.orders(four, 5, 0)}) == 5
    assert len(shots.orders(four, 100, 0)) == 6
    assert shots.orders(four, 5, 0)[0] == four
    wrong = shots.with_random_labels(ROWS, 3, seed=0)
    assert [r.texts for r in wrong] == [r.texts for r in ROWS]
    assert 0 < sum(a.label == b.label for a, b in zip(wrong, ROWS, strict=True)) < len(ROWS)


@pytest.fixture(scope="module")
def decoder():
    return Llama(dataclasses.replace(tiny(), initializer_range=0.5), rngs=nnx.Rngs(1))


def test_likelihoods_are_the_models(decoder):
    params = jpeft.functional(decoder).params
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(tuple(rng.integers(4, 30, n).tolist()), ((5, 6), (7,), (8, 9, 10)))
        for n in (3, 9, 20)
    ]
    scorer = Scorer(decoder, 4, lengths(32, 8), 0)
    assert scorer.lengths == (8, 16, 32)
    found, tokens = scorer(params, prompts)
    assert tokens == np.mean([3 * n + 1 + 0 + 2 for n in (3, 9, 20)])
    whole = jax.jit(lambda ids: jax.nn.log_softmax(decoder(ids[None])[0], axis=-1))
    for prompt, row in zip(prompts, found, strict=True):
        for label, value in zip(prompt.labels, row, strict=True):
            ids = np.array([*prompt.ids, *label])
            # What follows is read by none of them.
            likely = np.asarray(whole(jnp.pad(jnp.asarray(ids), (0, 24 - len(ids)))))
            at = np.arange(len(prompt.ids) - 1, len(ids) - 1)
            np.testing.assert_allclose(value, likely[at, ids[at + 1]].sum(), rtol=1e-4)
    mean, _ = dataclasses.replace(scorer, model=decoder, normalise="mean")(params, prompts)
    np.testing.assert_allclose(mean, found / [2, 1, 3], rtol=1e-6)
    # Labels of one token are read off one row.
    short = [dataclasses.replace(p, labels=((5,), (7,))) for p in prompts]
    one, tokens = scorer(params, short)
    np.testing.assert_allclose(one[:, 1], found[:, 1], rtol=1e-5)
    assert tokens == np.mean([3, 9, 20])
    with pytest.raises(ValueError, match="a prompt has 33 tokens, the model reads 32"):
        scorer(params, [Prompt((4,) * 33, ((5,), (7,)))])


def test_lora_learns_a_few_examples(decoder):
    recipe = Recipe(lambda s: jpeft.LoRA(s.rank, s.alpha, (r"_proj/kernel$",)), 1e-1)
    tune = FewShot(decoder, recipe, Sizes(rank=4), None, 40, 4, 8, 0)
    labels = ((5,), (7, 8))
    examples = [(Prompt((4, 10, 11), labels), 0), (Prompt((4, 12, 11), labels), 1)]
    scorer = Scorer(decoder, 4, (8,), 0)
    before, _ = scorer(tune.trainer.params, [p for p, _ in examples])
    after, _ = scorer(tune(examples, seed=0), [p for p, _ in examples])
    right = np.arange(2), np.array([0, 1])
    assert (after[right] > before[right] + 0.5).all()
    assert (np.argmax(after, axis=1) == [0, 1]).all()


@pytest.fixture
def made(tmp_path):
    """Options of a small run."""
    return {
        "task": "sst2",
        "data": write_task(tmp_path / "task"),
        "out": tmp_path / "out",
        "shots": (0, 2, 40),
        "peft": (4,),
        "sets": 2,
        "orders": 2,
        "steps": 2,
        "rows": 2,
        "batch": 8,
    }


def run(**options):
    said = io.StringIO()
    result = in_context.main(in_context.Config(**options), Console(file=said, width=200))
    return result, said.getvalue()


def test_the_whole_command(made, tmp_path):
    models = [str(write_decoder(tmp_path / "decoder" / s / "model")) for s in ("a", "b")]
    result, said = run(**made, models=tuple(models))
    assert result["experiment"] == "in_context"
    assert [m["size"] for m in result["models"]] == ["a", "b"]
    m = result["models"][0]
    assert set(m["k_shot"]) == {"0", "2"}
    assert len(m["k_shot"]["0"]["values"]) == 1
    assert len(m["k_shot"]["2"]["values"]) == 2
    assert m["not_fitting"] == [40]
    assert "does not fit" in said
    assert {name: (m[name]["k"], len(m[name]["values"])) for name in
            ("orders", "wordings", "random_labels")} == {
        "orders": (2, 2), "wordings": (2, 4), "random_labels": (2, 2)
    }  # fmt: skip
    assert m["orders"]["values"][0] == m["wordings"]["values"][0] == m["k_shot"]["2"]["values"][0]
    assert set(m["peft"]) == {"2", "4"}
    tokens = m["tokens_per_prediction"]
    assert tokens["0"] == tokens["peft"] < tokens["2"]
    assert m["parameters"] == sum(x.size for x in jax.tree.leaves(
        jpeft.functional(Llama(tiny(), rngs=nnx.Rngs(0))).params))  # fmt: skip
    assert result["majority"] == 0.5
    written = (made["out"] / "result.json").read_text()
    assert str(tmp_path) not in written
    assert json.loads(written)["models"] == result["models"]
    if importlib.util.find_spec("matplotlib"):
        assert (made["out"] / "in_context.png").stat().st_size > 5000
    # What is there is kept.
    (made["out"] / "result.json").unlink()
    again, said = run(**made, models=tuple(models), resume=True)
    assert again["models"] == result["models"]
    assert "demonstrations:" not in said


def test_calibration_takes_the_prior_away(decoder):
    codec = byte_codec()
    rows = [Row(("ab",), 0), Row(("cd",), 1)]
    asked = in_context_runs.Asked(rows, [], 10, 0, 2)
    wording = Wording("{0}", ("x", "y"))

    def scorer(params, prompts):
        # The second label is always likelier, by less where the text is the first one.
        texts = [codec.decode(p.ids) for p in prompts]
        return np.array([[0.0, 4.0 if t.startswith("ab") else 6.0] for t in texts]) - [
            [0.0, 0.0] if not t.startswith("N/A") else [0.0, 1.0] for t in texts
        ], 1.0

    loaded = Loaded(decoder, codec, LLAMA, None)
    for calibrate, right in ((False, 0.5), (True, 1.0)):
        model = in_context_runs.Model(loaded, {}, scorer, asked, calibrate)
        assert model.accuracy(wording) == (right, 1.0)


def test_wrong_input_is_told(made, tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        run(**made, models=(str(tmp_path / "a" / "b" / "c"),))
    made |= {"out": None}
    encoder = write_model(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="holds a model of type 'bert'"):
        run(**made, models=(str(encoder),))
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    save_model(T5(T5Config(vocab_size=30, **shape), rngs=nnx.Rngs(0)), tmp_path / "t5")
    (tmp_path / "t5" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    with pytest.raises(ValueError, match="t5 has an encoder"):
        run(**made, models=(str(tmp_path / "t5"),))
    decoder = str(write_decoder(tmp_path / "decoder"))
    with pytest.raises(ValueError, match=r"--shots 30 40: none fits in the \d+ tokens"):
        run(**made | {"shots": (30, 40)}, models=(decoder,))
    with pytest.raises(ValueError, match="no text of sst2 can be asked about"):
        run(**made, models=(decoder,), context=8)
    with pytest.raises(ValueError, match="--wording 4: sst2 has 0 to 3"):
        run(**made, models=(decoder,), wording=4)
    with pytest.raises(ValueError, match="of different names"):
        run(**made, models=(decoder, decoder))
    with pytest.raises(ValueError, match="need --out"):
        run(**made, models=(decoder,), processes=2)
    with pytest.raises(ValueError, match="--sets 0: at least 1"):
        run(**made | {"sets": 0}, models=(decoder,))
