"""A small encoder, ours and theirs, which tests of adapters share."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import load_sequence_classifier
from tests.hf.beside import IDS, KEY
from tests.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A model none of whose biases is zero."""
    path = write_model(tmp_path_factory.mktemp("base") / "model")
    weights = path / "model.safetensors"
    rng = np.random.default_rng(0)
    noisy = {
        k: v + 0.2 * rng.normal(size=v.shape).astype(np.float32)
        for k, v in load_file(weights).items()
    }
    save_file(noisy, weights, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ours(folder):
    """Ours as `(apply, params, uses)`."""
    model, _ = load_sequence_classifier(folder, 2, key=KEY)
    apply, params = jpeft.functional(model)
    return apply, params, jpeft.uses(apply, params, jnp.asarray(IDS))


@pytest.fixture(scope="module")
def hf():
    """torch, transformers and peft."""
    return (
        pytest.importorskip("torch", reason="needs the interop extra"),
        pytest.importorskip("transformers"),
        pytest.importorskip("peft"),
    )
