"""Steps of models with random weights: what is drawn, and what is measured of a tiny one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jpeft
from experiments import bench_large
from experiments.common.decoders import LAYOUTS
from experiments.common.random_base import random_params
from jpeft.leaf import dense as dense_of
from jpeft.models.llama import Llama
from jpeft.paths import flatten

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
LINEAR = LAYOUTS[Llama].linear


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_a_step(model, tmp_path):
    config = bench_large.Config(
        model, rank=4, sequence=32, steps=3, chunk=32, out=tmp_path / "out", quantize="nf4"
    )
    result = bench_large.main(config, Console(quiet=True))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["losses"] == result["losses"]
    assert len(result["losses"]) == 5
    assert result["losses"][-1] < result["losses"][0]
    # Kernels of three layers in 4 bits and their scales; the table, the head and the norms in bf16.
    kernels = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    rest = 2 * (2 * 512 * 64 + 7 * 64)
    assert kernels / 2 < result["held_bytes"]["frozen"] - rest < 0.6 * kernels
    assert result["tokens_per_second"] > 0
    with pytest.raises(ValueError, match="--overwrite"):
        bench_large.main(config, Console(quiet=True))


def test_wrong_numbers(model):
    with pytest.raises(ValueError, match="--steps"):
        bench_large.main(bench_large.Config(model, steps=0))


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_random_params(quantize):
    shape = jax.ShapeDtypeStruct
    dense = {
        "embed_tokens": {"embedding": shape((64, 32), jnp.float32)},
        "layers": {
            "mlp": {"up_proj": {"kernel": shape((2, 32, 512), jnp.float32)}},
            "norm": {"scale": shape((2, 32), jnp.float32)},
        },
    }
    uses = _uses(dense)
    params = random_params(jax.random.key(0), dense, LINEAR, quantize, uses)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, jpeft.Quantized) == (quantize is not None)
    weight = np.asarray(dense_of(kernel) if quantize else kernel)
    assert weight.shape == (2, 32, 512)
    assert weight.std() == pytest.approx(32**-0.5, rel=0.05)
    assert np.abs(weight[0] - weight[1]).max() > 0.1
    assert np.all(np.asarray(params["layers"]["norm"]["scale"]) == 1)
    table = np.asarray(params["embed_tokens"]["embedding"])
    assert table.std() == pytest.approx(0.02, rel=0.1)
    again = random_params(jax.random.key(0), dense, LINEAR, quantize, uses)
    for path, leaf in flatten(params).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, flatten(again)[path])


def _uses(dense):
    def scanned(params, x):
        h = params["embed_tokens"]["embedding"][x]

        def body(h, layer):
            return h, (h * layer["norm"]["scale"]) @ layer["mlp"]["up_proj"]["kernel"]

        return jax.lax.scan(body, h, params["layers"])[1]

    return jpeft.uses(scanned, dense, jnp.zeros((1, 4), jnp.int32))
