"""Classifiers in the commands: which directories are some, their labels, and no random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.cli import main
from jpeft.hf import CheckpointError, load_sequence_classifier, save_adapter
from jpeft.hf.opened import label_names, open_model
from tests.tiny import edit_config, write_model

IDS = jnp.array([[2, 5, 9, 3]])
KEY = jax.random.key(0)


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", num_labels=3)


@pytest.fixture
def encoder(folder):
    """A pre-trained BERT, which has no classifier."""
    file = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("classifier")}
    save_file(kept, file)
    edit_config(folder, architectures=["BertForMaskedLM"])
    return folder


def trained(folder, method, out, task):
    """An adapter's directory, and what it makes of the model."""
    opened = open_model(folder)
    apply, params = jpeft.functional(opened.model)
    state = method.init(KEY, params, uses=jpeft.uses(apply, params, IDS))
    state = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), state)
    save_adapter(out, method, state, params, opened.family, task_type=task)
    jpeft.save(out.with_suffix(".safetensors"), state, method)
    return jpeft.lift(apply)(method.rewrite(params, state), IDS)


QUERY = jpeft.LoRA(2, 8.0, r"query/kernel$")
HEAD = jpeft.chain(QUERY, jpeft.Train("^classifier/"))


def merged(folder, adapter, out):
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--out", str(out)]
    return main(["merge", *arguments])


@pytest.mark.parametrize("kind", ["BertForTokenClassification", "BertForQuestionAnswering"])
def test_another_head_is_refused(kind, folder):
    edit_config(folder, architectures=[kind])
    with pytest.raises(CheckpointError, match=f"holds a {kind}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, {0: "LABEL_0", 1: "LABEL_1"}),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, {0: "a", 1: "b", 2: "c"}),
        ({"num_labels": 1}, {0: "LABEL_0"}),
        ({"num_labels": 1, "id2label": {"0": "a", "1": "b"}}, {0: "LABEL_0"}),
    ],
)
def test_labels_are_those_of_transformers(config, want):
    assert label_names(config) == want


def test_a_head_with_other_classes_than_labels_is_told(folder):
    edit_config(folder, id2label=None, label2id=None)
    with pytest.raises(CheckpointError, match="has not the 2 classes of config.json"):
        open_model(folder)
    edit_config(folder, num_labels=3)
    want, _ = load_sequence_classifier(folder, 3, key=KEY)
    np.testing.assert_array_equal(open_model(folder).model(IDS), want(IDS))


def test_an_encoder_is_merged_with_a_head_that_the_adapter_brings(encoder, tmp_path):
    want = trained(encoder, HEAD, tmp_path / "adapter", "SEQ_CLS")
    assert merged(encoder, tmp_path / "adapter", tmp_path / "out") == 0
    np.testing.assert_allclose(open_model(tmp_path / "out").model(IDS), want, atol=1e-4)


def test_no_merged_head_is_drawn_at_random(encoder, tmp_path, capsys):
    trained(encoder, QUERY, tmp_path / "adapter", None)
    assert merged(encoder, tmp_path / "adapter", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "would be drawn at random" in said
    assert "classifier/kernel" in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_token_classes_is_refused(encoder, tmp_path, capsys):
    trained(encoder, HEAD, tmp_path / "adapter", "TOKEN_CLS")
    assert merged(encoder, tmp_path / "adapter", tmp_path / "out") == 2
    assert "was trained for TOKEN_CLS" in capsys.readouterr().err


def test_an_encoder_is_quantised_without_a_head(encoder, tmp_path):
    out = tmp_path / "four"
    assert main(["quantize", "--model", str(encoder), "--out", str(out), "--block", "8"]) == 0
    _, report = load_sequence_classifier(out, 3, key=KEY)
    assert report.new == ("classifier/bias", "classifier/kernel")


def test_an_encoders_adapter_is_converted_without_a_head(encoder, tmp_path):
    trained(encoder, QUERY, tmp_path / "adapter", None)
    arguments = ["--model", str(encoder), "--adapter", str(tmp_path / "adapter.safetensors")]
    assert main(["convert", *arguments, "--out", str(tmp_path / "again")]) == 0
    tensors = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert not [name for name in tensors if "classifier" in name]


def test_the_kind_of_problem_is_kept(folder, tmp_path):
    edit_config(folder, problem_type="multi_label_classification")
    trained(folder, HEAD, tmp_path / "adapter", "SEQ_CLS")
    assert merged(folder, tmp_path / "adapter", tmp_path / "out") == 0
    four = ["--model", str(folder), "--out", str(tmp_path / "four"), "--block", "8"]
    assert main(["quantize", *four]) == 0
    for made in ("out", "four"):
        config = json.loads((tmp_path / made / "config.json").read_text())
        assert config["problem_type"] == "multi_label_classification"
