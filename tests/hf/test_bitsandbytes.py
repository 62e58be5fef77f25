"""Checkpoints whose weights bitsandbytes quantised to 4 bits."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.hf import CheckpointError, load_model, save_model
from jpeft.models.llama import Llama, LlamaConfig

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("bitsandbytes.functional")
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = jnp.asarray(np.random.default_rng(0).integers(3, 40, (2, 9)), jnp.int32)


def stands_for(codes, state):
    """The numbers by their definition: bitsandbytes' kernel for AVX-512 takes wrong scales where a
    row is not whole blocks."""
    scales = state.absmax
    if state.nested:
        scales = theirs.dequantize_blockwise(scales, state.state2) + state.offset
    pairs = codes.reshape(-1).long()
    each = state.code[torch.stack([pairs >> 4, pairs & 15], -1).reshape(-1, state.blocksize)]
    return (each * scales.reshape(-1, 1)).reshape(state.shape).numpy()


def packed(folder, form="nf4", double=True, block=64, config=CONFIG):
    """A directory as transformers writes one, and the dense tensors that it stands for."""
    save_model(Llama(config, rngs=nnx.Rngs(0)), folder)
    file = folder / "model.safetensors"
    dense, out = {}, {}
    for name, value in load_file(file).items():
        if "_proj.weight" not in name:
            out[name] = dense[name] = value
            continue
        options = {"blocksize": block, "quant_type": form, "compress_statistics": double}
        codes, state = theirs.quantize_4bit(torch.from_numpy(value.copy()), **options)
        out[name] = codes.numpy()
        out |= {f"{name}.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
        dense[name] = stands_for(codes, state)
    save_file(out, file)
    about = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": form}
    (folder / "config.json").write_text(json.dumps(about | {"quantization_config": method}))
    return folder, dense


def loaded(folder):
    model, _ = load_model(folder)
    return jpeft.functional(model)


@pytest.mark.parametrize(
    ("form", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
)
def test_the_same_numbers(form, double, tmp_path):
    folder, dense = packed(tmp_path / "theirs", form, double)
    apply, params = loaded(folder)
    layers = params["model"]["layers"]
    for part, name in (("mlp", "down_proj"), ("self_attn", "q_proj")):
        leaf = layers[part][name]["kernel"]
        assert isinstance(leaf, jpeft.Quantized)
        for i in range(2):
            wanted = dense[f"model.layers.{i}.{part}.{name}.weight"].T
            # Scales in 8 bits are multiplied and added in one rounding there, in two here.
            tolerance = {"rtol": 1e-6, "atol": 1e-7} if double else {"rtol": 0, "atol": 0}
            np.testing.assert_allclose(leaf.materialise()[i], wanted, **tolerance)
    save_file(dense, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    del about["quantization_config"]
    (folder / "config.json").write_text(json.dumps(about))
    plain, whole = loaded(folder)
    out = jpeft.lift(apply)(params, IDS)
    np.testing.assert_allclose(out, plain(whole, IDS), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_whole_blocks_are_made_dense(tmp_path, caplog):
    folder, dense = packed(tmp_path / "theirs", block=128)
    with caplog.at_level(logging.WARNING, logger="jpeft"):
        _, params = loaded(folder)
    assert "are made dense" in caplog.text
    kernel = params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(kernel, jax.Array)
    wanted = dense["model.layers.1.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(kernel[1], wanted, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_read_is_told(tmp_path):
    folder, _ = packed(tmp_path / "theirs")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != f"{name}.nested_absmax"}, file)
    with pytest.raises(CheckpointError, match="missing: .*nested_absmax"):
        loaded(folder)
    save_file(tensors | {f"{name}.absmax": tensors[f"{name}.absmax"][:-1]}, file)
    with pytest.raises(CheckpointError, match="misshapen: .*absmax"):
        loaded(folder)
    save_file(tensors | {"model.layers.0.mlp.up_proj.SCB": np.ones(3, np.float32)}, file)
    with pytest.raises(CheckpointError, match="8 bits by bitsandbytes"):
        loaded(folder)
