"""Files that have a tied table twice: a copy is passed over, and what is none is refused."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jpeft.hf import CheckpointError, load_model, save_model
from jpeft.hf.models import KINDS

SHAPES = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8},
    "t5": {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "qwen2": {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": True, "model_type": "qwen2",
    },
}  # fmt: skip
CASES = [
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("t5", "lm_head.weight", "shared.weight"),
    ("t5", "decoder.embed_tokens.weight", "shared.weight"),
    ("qwen2", "lm_head.weight", "model.embed_tokens.weight"),
]


def written(kind, folder):
    made = KINDS[kind]
    save_model(made.model(made.config(**SHAPES[kind]), rngs=nnx.Rngs(0)), folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize(("kind", "copy", "table"), CASES)
def test_a_copy_of_the_table_is_passed_over(kind, copy, table, tmp_path, monkeypatch):
    monkeypatch.setattr("jpeft.hf.files.PIECE", 1000)  # in several
    file = written(kind, tmp_path)
    tensors = load_file(file)
    save_file({**tensors, copy: tensors[table]}, file)
    assert load_model(tmp_path)[1].ignored == (copy,)


@pytest.mark.parametrize(("kind", "copy", "table"), CASES)
def test_a_table_of_its_own_is_refused(kind, copy, table, tmp_path, monkeypatch):
    monkeypatch.setattr("jpeft.hf.files.PIECE", 1000)
    file = written(kind, tmp_path)
    tensors = load_file(file)
    last = tensors[table].copy()
    last[-1, -1] += 1
    for other in (last, tensors[table][:-1], tensors[table].astype(np.float16)):
        save_file({**tensors, copy: other}, file)
        with pytest.raises(CheckpointError, match=f"differs: {copy} is no copy of {table}"):
            load_model(tmp_path)
