"""The same codes and numbers as bitsandbytes makes of the same weight."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import nibbles
from jpeft.dynamic_map import dynamic_map

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("bitsandbytes.functional")
W = np.random.default_rng(0).standard_normal((1024, 384)).astype(np.float32)


def both(form, double):
    """Our leaf of a kernel (in, out), and their bytes and state of the (out, in) matrix."""
    leaf = jpeft.Quantize("w", form, double=double)({"w": jnp.asarray(W)})["w"]
    weight = torch.from_numpy(W.T.copy())
    try:
        packed, state = theirs.quantize_4bit(
            weight, blocksize=64, quant_type=form, compress_statistics=double
        )
    except (RuntimeError, NotImplementedError, OSError) as e:
        pytest.skip(f"bitsandbytes does not run here: {e}")
    return leaf, packed, state


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_code_by_code(form):
    leaf, packed, state = both(form, double=False)
    blocks = leaf.codes.reshape(1024 // 64, 32, 384)
    codes = np.asarray(nibbles.unpack(blocks, 1)).reshape(1024, 384).T.reshape(-1)
    pairs = packed.numpy().reshape(-1)
    np.testing.assert_array_equal(codes, np.stack([pairs >> 4, pairs & 15], -1).reshape(-1))
    np.testing.assert_array_equal(np.asarray(leaf.scales).T.reshape(-1), state.absmax.numpy())
    dense = theirs.dequantize_4bit(packed, state).numpy().T
    np.testing.assert_array_equal(leaf.materialise(), dense)


def test_double_quantisation():
    leaf, _, state = both("nf4", double=True)
    np.testing.assert_allclose(dynamic_map(signed=True), state.state2.code.numpy(), rtol=3e-7)
    np.testing.assert_allclose(leaf.scales.mean, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(leaf.scales.absmax, state.state2.absmax.numpy(), rtol=1e-6)
    off = np.asarray(leaf.scales.codes).T.reshape(-1) - state.absmax.numpy().astype(int)
    # Their processor code looks codes up in a coarse table: near a midpoint it takes the farther.
    assert np.abs(off).max() <= 1
    assert (off != 0).mean() < 0.005
