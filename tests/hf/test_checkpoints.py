"""Reading and writing model directories, whole and damaged."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import CheckpointError, load_bert, load_sequence_classifier, save_sequence_classifier
from tests.tiny import edit_config, write_model

IDS = jnp.array([[2, 5, 9, 3], [2, 7, 3, 0]])
KEY = jax.random.key(0)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write_model(tmp_path / "model")


def weights(folder):
    return folder / "model.safetensors"


def shard(folder, parts=2):
    tensors = load_file(weights(folder))
    where = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        piece = {k: v for j, (k, v) in enumerate(sorted(tensors.items())) if j % parts == i}
        save_file(piece, folder / name)
        where |= dict.fromkeys(piece, name)
    weights(folder).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_round_trip_bit_for_bit(kind, tmp_path):
    first = write_model(tmp_path / "one", kind)
    model, report = load_sequence_classifier(first, 2, key=KEY)
    assert report.new == ()
    save_sequence_classifier(model, tmp_path / "two")
    one, two = load_file(weights(first)), load_file(weights(tmp_path / "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_shards_are_the_same_model(folder, tmp_path):
    want = load_sequence_classifier(folder, 2, key=KEY)[0](IDS)
    shard(folder)
    np.testing.assert_array_equal(load_sequence_classifier(folder, 2, key=KEY)[0](IDS), want)


def test_merged_parameters_are_what_is_written(folder, tmp_path):
    model, _ = load_sequence_classifier(folder, 2, key=KEY)
    apply, params = jpeft.functional(model)
    method = jpeft.LoRA(2, 4.0, r"(query|value|dense)/kernel$")
    uses = jpeft.uses(apply, params, IDS)
    state = method.init(KEY, params, uses=uses)
    state = jax.tree.map(lambda x: x + 0.3, state)
    rewritten = method.rewrite(params, state)
    save_sequence_classifier(model, tmp_path / "merged", jpeft.merge(rewritten))
    again, _ = load_sequence_classifier(tmp_path / "merged", 2, key=KEY)
    np.testing.assert_allclose(again(IDS), jpeft.lift(apply)(rewritten, IDS), atol=1e-5)
    assert not np.allclose(again(IDS), model(IDS), atol=1e-4)


def test_a_new_head_is_reported_and_seeded(folder):
    model, report = load_sequence_classifier(folder, 5, key=KEY)
    assert report.new == ("classifier/bias", "classifier/kernel")
    assert model(IDS).shape == (2, 5)
    again, _ = load_sequence_classifier(folder, 5, key=KEY)
    np.testing.assert_array_equal(model(IDS), again(IDS))
    other, _ = load_sequence_classifier(folder, 5, key=jax.random.key(1))
    assert not np.array_equal(model(IDS), other(IDS))
    # It is the head that a whole new model of this key has.
    new = type(model)(model.config, 5, rngs=nnx.Rngs(KEY))
    np.testing.assert_allclose(
        model.classifier.kernel[...], new.classifier.kernel[...], rtol=1e-6, atol=1e-8
    )


def test_the_encoder_alone(folder):
    encoder, report = load_bert(folder, key=KEY)
    model, _ = load_sequence_classifier(folder, 2, key=KEY)
    assert set(report.ignored) == {"classifier.weight", "classifier.bias"}
    np.testing.assert_array_equal(encoder(IDS), model.encoder(IDS))


def truncated(folder):
    weights(folder).write_bytes(weights(folder).read_bytes()[:-50])


def garbage(folder):
    weights(folder).write_bytes(b"no tensors here" * 10)


def empty(folder):
    weights(folder).write_bytes(b"")


def without(name):
    def edit(folder):
        tensors = load_file(weights(folder))
        save_file({k: v for k, v in tensors.items() if k != name}, weights(folder))

    return edit


def added(folder):
    tensors = load_file(weights(folder))
    save_file({**tensors, "bert.encoder.extra.weight": np.ones(2)}, weights(folder))


def lost_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def escaping(folder):
    shard(folder)
    index = {"weight_map": {"x": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder):
    weights(folder).rename(folder / "pytorch_model.bin")


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
DAMAGE = {
    "truncated": (truncated, r"model.safetensors .* is no complete safetensors file"),
    "garbage": (garbage, "is no complete safetensors file"),
    "empty": (empty, "is no complete safetensors file"),
    "a tensor missing": (
        without(QUERY),
        r"missing: bert\.encoder\.layer\.1\.attention\.self\.query\.weight",
    ),
    "a tensor too many": (added, r"unexpected: bert\.encoder\.extra\.weight"),
    "a shard missing": (lost_shard, "names model-00002-of-00002.safetensors, which is absent"),
    "an index that escapes": (escaping, "points outside its directory"),
    "pickled": (pickled, "loading a pickle runs code"),
    "no weights": (lambda f: weights(f).unlink(), "has neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "another type": (lambda f: edit_config(f, model_type="gpt2"), "model of type 'gpt2'"),
    "another width": (lambda f: edit_config(f, hidden_size=20), "misshapen: "),
    "no such folder": (shutil.rmtree, "is not a directory"),
    "an unknown activation": (lambda f: edit_config(f, hidden_act="swoosh"), "swoosh"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_in_few_lines(what, folder):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as e:
        load_sequence_classifier(folder, 2, key=KEY)
    assert len(str(e.value).splitlines()) <= 10


def test_a_failed_save_leaves_what_was_there(folder, monkeypatch):
    model, _ = load_sequence_classifier(folder, 2, key=KEY)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(arrays, path, metadata=None):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jpeft.hf.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_sequence_classifier(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_mean_pooling_has_no_name_in_hugging_face(folder, tmp_path):
    model, _ = load_sequence_classifier(folder, 2, key=KEY, pooling="mean")
    with pytest.raises(ValueError, match="save with pooling='cls'"):
        save_sequence_classifier(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_transformers_loads_what_is_written(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path / "model", kind)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ours, _ = load_sequence_classifier(folder, 2, key=KEY)
    ids = np.where(np.array(IDS) == 0, ours.config.pad_token_id, IDS)
    with torch.no_grad():
        want = theirs(torch.tensor(ids.astype(np.int64))).logits
    np.testing.assert_allclose(ours(jnp.asarray(ids)), want.numpy(), atol=1e-5)
