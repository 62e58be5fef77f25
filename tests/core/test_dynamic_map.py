"""The dynamic map beside bitsandbytes', and codes beside a search for the nearest value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpeft.dynamic_map import _borders, _counted, decode, dynamic_map, encode

BOTH = pytest.mark.parametrize("signed", [True, False])


def nearest(x, values):
    """The lower of the nearest values, one number after another, in exact arithmetic."""
    middles = (values[:-1] + values[1:]) / np.float32(2)
    return np.searchsorted(middles, x).astype(np.uint8)


def numbers(values):
    """Random ones over all decades, all borders and what is next to them, and special ones."""
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], 50_000) * 10 ** rng.uniform(-9, 0, 50_000)
    middles = (values[:-1] + values[1:]) / np.float32(2)
    close = [middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9))]
    special = [0.0, -0.0, 1, -1, 2, -2, 1e-45, np.inf, -np.inf]
    return np.concatenate([x, *close, values, special]).astype(np.float32)


@BOTH
def test_the_map(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert values.dtype == np.float32
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1
    assert 0 in values
    # Half of the top decade's first of 64 or 128 parts, counted from 0.1.
    assert np.min(values[values > 0.1]) == pytest.approx(0.1 + 0.45 / (64 if signed else 128))
    assert values[0] == pytest.approx(-1 + 0.45 / 64 if signed else 0)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0


@BOTH
@pytest.mark.parametrize("compiled", [True, False])
def test_codes_are_of_the_nearest_value(signed, compiled):
    values = dynamic_map(signed)
    x = numbers(values)
    run = jax.jit(lambda x: encode(x, values)) if compiled else lambda x: encode(x, values)
    got = run(jnp.asarray(x))
    np.testing.assert_array_equal(got, nearest(x, values))
    np.testing.assert_array_equal(decode(got, values), values[got])
    exact = np.abs(x[:, None].astype(np.float64) - values).argmin(1)
    clear = np.isfinite(x)
    x, code, exact = x[clear], np.asarray(got)[clear], exact[clear]
    assert np.max(np.abs(x - values[code]) - np.abs(x - values[exact])) <= 2.0**-23  # fp32 borders


@BOTH
def test_counting_borders_is_the_same(signed):
    """What TPUs do, run here."""
    values = dynamic_map(signed)
    x = numbers(values)
    borders, cells = _borders(values.tobytes())
    assert cells is not None
    got = jax.jit(lambda x: _counted(x, borders))(jnp.asarray(x))
    np.testing.assert_array_equal(got, nearest(x, values))
    assert int(_counted(jnp.asarray([jnp.nan]), borders)[0]) == 255
    assert int(encode(jnp.asarray([jnp.nan]), values)[0]) == 255


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=256),
    shape=st.sampled_from([(), (3,), (2, 3, 4)]),
)
def test_any_map_and_shape(values, shape):
    values = np.sort(np.asarray(values, np.float32))
    x = np.random.default_rng(1).uniform(-1.2, 1.2, shape).astype(np.float32)
    got = encode(jnp.asarray(x), values)
    assert got.shape == shape
    np.testing.assert_array_equal(got, nearest(x, values))


@BOTH
def test_every_value_is_its_own_code(signed):
    values = dynamic_map(signed)
    every = jnp.arange(256, dtype=jnp.uint8).reshape(2, 128)
    np.testing.assert_array_equal(encode(decode(every, values), values), every)


def test_narrow_types_are_widened():
    x = jnp.asarray([0.3, -0.7], jnp.bfloat16)
    values = dynamic_map(True)
    np.testing.assert_array_equal(encode(x, values), nearest(np.asarray(x, np.float32), values))


def test_wrong_maps_are_refused():
    for values in ([1.0], [1.0, 0.0], np.arange(257.0)):
        with pytest.raises(ValueError, match="2 to 256 sorted numbers"):
            encode(jnp.zeros(3), np.asarray(values))


@pytest.mark.interop
@BOTH
def test_bitsandbytes_has_the_same_map_and_codes(signed):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    theirs = functional.create_dynamic_map(signed).numpy()
    np.testing.assert_allclose(dynamic_map(signed), theirs, rtol=2e-7, atol=0)

    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 256)).astype(np.float32)
    x = (x if signed else np.abs(x)) / np.abs(x).max(1, keepdims=True)
    x[:, 0] = 1  # every block's scale is 1
    code = torch.tensor(theirs)
    got = np.asarray(encode(jnp.asarray(x), theirs))
    # Doubles go the long way there: the nearest of all values, without a shortcut.
    quantise = torch.ops.bitsandbytes.quantize_blockwise.default
    exact, scales = quantise(torch.tensor(x, dtype=torch.float64), code, 256)
    assert np.all(scales.numpy() == 1)
    np.testing.assert_array_equal(got, exact.numpy())
    # Its shortcut for fp32 on CPUs rounds to a grid of 16 bits: another code only beside a border.
    fast, _ = functional.quantize_blockwise(torch.tensor(x), code=code, blocksize=256)
    other = got != fast.numpy()
    assert other.mean() < 0.005
    middles = (theirs[:-1] + theirs[1:]) / 2
    assert np.abs(x[other][:, None] - middles).min(1).max() < 1 / 65535
