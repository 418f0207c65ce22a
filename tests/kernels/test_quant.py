"""`QTensor`, packing and block scales of weights, against tables of the formats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import QTensor, dequantise, quant, quantise
from pallas_kernels.quant import pack_int4, unpack_int4
from pallas_kernels.testing import assert_equal, call, jit
from tests.oracles import formats

GOLDEN_INT4 = np.int8([-8, -1, 0, 7]), np.uint8([0xF8, 0x70])


def check_packing(pack):
    q, packed = GOLDEN_INT4
    assert_equal(pack(jnp.asarray(q)), packed)


def test_int4_golden_bytes():
    check_packing(pack_int4)
    assert_equal(unpack_int4(jnp.asarray(GOLDEN_INT4[1])), GOLDEN_INT4[0])


@pytest.mark.parametrize(
    "broken",
    [
        lambda q: (pack_int4(q) >> 4) | (pack_int4(q) << 4),  # even column high
        lambda q: pack_int4(q) ^ 0x88,  # offset binary
        lambda q: pack_int4(q.reshape(2, -1).T.reshape(-1)),  # halves instead of pairs
    ],
)
def test_golden_bytes_see_another_nibble_order(broken):
    with pytest.raises(AssertionError):
        check_packing(broken)


@given(st.lists(st.integers(-8, 7), min_size=16, max_size=16))
def test_int4_round_trip(values):
    q = np.int8(values).reshape(2, 8)
    packed = call(pack_int4, {"q": jnp.asarray(q)})
    assert_equal(packed, formats.int4_pack(q))
    assert_equal(call(unpack_int4, {"packed": packed}), q)


def test_int4_needs_an_even_number_of_columns():
    with pytest.raises(ValueError, match="got 3"):
        pack_int4(jnp.zeros((2, 3), jnp.int8))


def test_table_of_e4m3_is_the_library_format():
    """The oracle's table against all 256 bytes of ml_dtypes' format."""
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        formats.from_e4m3(codes), codes.view(jnp.float8_e4m3fn).astype(np.float64)
    )


def test_casts_above_464_are_nan_in_jax():
    """Why values are clipped before every cast; if this changes, the clip may go."""
    got = jnp.asarray([448.0, 464.0, 465.0, 1e9], jnp.float32).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(got.astype(jnp.float32), [448, 448, np.nan, np.nan])


# Written down from the format: 4 exponent bits with bias 7, 3 mantissa bits, subnormals of 2^-9.
E4M3_CODES = {
    448.0: 0x7E,
    -448.0: 0xFE,
    240.0: 0x77,
    1.0: 0x38,
    2.0**-6: 0x08,  # smallest normal
    7 * 2.0**-9: 0x07,  # largest subnormal
    2.0**-9: 0x01,
    2.0**-10: 0x00,  # half of the smallest: to even
    3 * 2.0**-10: 0x02,
    1.0625: 0x38,  # between 1 and 1.125
    1.1875: 0x3A,  # between 1.125 and 1.25
    -1.1875: 0xBA,
    np.nextafter(np.float32(1.0625), np.float32(2)): 0x39,
    432.0: 0x7E,  # between 416 and 448
    0.0: 0x00,
}


@pytest.mark.parametrize("recipe", [quant.FP8_BLOCK, quant.FP8_TILE], ids=["block", "tile"])
def test_e4m3_golden_codes(recipe):
    """A block whose largest value is 448 has scale 1, so its codes are those of its values."""
    x = np.float32([list(E4M3_CODES)])
    q = call(quantise, {"x": jnp.asarray(x), "recipe": recipe})
    assert_equal(q.scales, np.float32([[1]]))
    assert_equal(np.asarray(q.values).view(np.uint8), np.uint8([list(E4M3_CODES.values())]))


def test_every_e4m3_value_and_midpoint():
    """All 253 finite values keep their code; halfway between two, the even code wins."""
    exact = np.arange(127, dtype=np.uint8)
    table = formats.from_e4m3(exact)
    middle = (table[1:] + table[:-1]) / 2
    even = np.where(exact[1:] % 2 == 0, exact[1:], exact[:-1])
    for sign, bit in ((1, 0), (-1, 0x80)):
        x = np.float32([[*(sign * table), *(sign * middle)]])
        q = call(quantise, {"x": jnp.asarray(x), "recipe": quant.FP8_TENSOR})
        assert_equal(np.asarray(q.values).view(np.uint8)[0], np.uint8([*exact, *even]) | bit)
        assert_equal(dequantise(q)[0, :127], np.float32(sign * table))


def test_int4_golden_groups():
    """Scale amax / 7, ties to even, never -8; a group of zeros has scale 1."""
    first = [7, -7, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -6.5, 6.5, 4.75]
    want = [7, -7, 0, 2, 2, 4, 0, -2, -2, -6, 6, 5]
    x = np.zeros((3, 256), np.float32)
    x[0, :12], x[1, :12], x[2, 128:140] = first, np.float32(first) / 4, first
    q = call(quantise, {"x": jnp.asarray(x), "recipe": quant.INT4_GROUP})
    assert_equal(q.scales, np.float32([[1, 1], [0.25, 1], [1, 1]]))
    bytes_ = np.zeros((3, 128), np.uint8)
    bytes_[0, :6] = bytes_[1, :6] = bytes_[2, 64:70] = [0x97, 0x20, 0x42, 0xE0, 0xAE, 0x56]
    assert_equal(q.values, bytes_)
    assert_equal(unpack_int4(q.values)[0, :12], np.int8(want))


@given(st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8))
def test_int4_uses_minus_seven_to_seven(values):
    q = call(quantise, {"x": jnp.asarray([values], jnp.float32), "recipe": quant.INT4_GROUP})
    codes = formats.int4_unpack(q.values)
    assert codes.min() >= -7 and codes.max() <= 7
    if max(map(abs, values)) > 1e-30:
        assert np.abs(codes).max() == 7, "the largest magnitude is not at the end of the range"


WEIGHTS = {
    "e4m3": quant.FP8_BLOCK,
    "int4": quant.INT4_GROUP,
}


def check_weight(q, x, recipe):
    """Scales of every ragged block, then each value exactly under them."""
    amax = formats.block_amax(x, q.block, recipe.floor)
    limit = 448 if recipe.format == "e4m3" else 7
    want = np.where(amax / limit > 0, amax / limit, 1)
    np.testing.assert_allclose(q.scales, want, rtol=2.0**-22)
    flat = np.float32(x).reshape(-1, *x.shape[-2:])
    scales = np.asarray(q.scales).reshape(len(flat), *q.scales.shape[-2:])
    if recipe.format == "e4m3":
        codes = np.asarray(q.values).view(np.uint8).reshape(flat.shape)
    else:
        codes = formats.int4_unpack(q.values).reshape(flat.shape)
    for matrix, scale, code in zip(flat, scales, codes, strict=True):
        for at, part in formats.blocks(matrix.shape, q.block):
            scaled = matrix[part] / scale[at]
            if recipe.format == "e4m3":
                assert_equal(code[part], formats.to_e4m3(scaled))
            else:
                np.testing.assert_array_equal(code[part], np.rint(scaled).clip(-8, 7))


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize(
    ("shape", "compiled"), [((2, 130, 300), True), ((40, 36), True), ((40, 36), False)]
)
def test_weights_match_oracle(format, shape, compiled):
    recipe, rng = WEIGHTS[format], np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) * np.exp(rng.uniform(-3, 3, (*shape[:-1], 1)))
    x = np.float32(x)
    args = {"x": jnp.asarray(x), "recipe": recipe}
    q = call(quantise, args) if compiled else quantise(**args)
    assert q.shape == shape and q.ndim == len(shape)
    check_weight(q, x, recipe)
    real = formats.dequantise(np.asarray(q.values), np.asarray(q.scales), q.block, format)
    np.testing.assert_allclose(dequantise(q), real, rtol=2.0**-23)
    assert_equal(dequantise(q, jnp.bfloat16), dequantise(q).astype(jnp.bfloat16))


@pytest.mark.parametrize("change", [lambda s: s * 1.01, lambda s: jnp.roll(s, 1, axis=-2)])
@pytest.mark.parametrize("format", WEIGHTS)
def test_suite_sees_other_scales(format, change):
    x = np.float32(np.random.default_rng(0).standard_normal((2, 130, 300)))
    x[:, :128] *= 3
    q = call(quantise, {"x": jnp.asarray(x), "recipe": WEIGHTS[format]})
    check_weight(q, x, WEIGHTS[format])
    with pytest.raises(AssertionError):
        check_weight(dataclasses.replace(q, scales=change(q.scales)), x, WEIGHTS[format])


@pytest.mark.parametrize("recipe", [*WEIGHTS.values(), quant.FP8_TILE, quant.FP8_TENSOR])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 3e-36, 1e-4, 1.0, 3e38])
def test_finite_values_never_become_nan(recipe, size):
    """Not even blocks of zeros, or so small that their scale is no normal number."""
    x = jnp.asarray([[size, 0, -size, size / 3]], jnp.float32)
    q = call(quantise, {"x": x, "recipe": recipe})
    assert np.isfinite(q.scales).all() and (np.asarray(q.scales) > 0).all()
    real = np.asarray(dequantise(q))
    assert np.isfinite(real).all() and (np.abs(real) <= 1.001 * size).all()


@pytest.mark.parametrize(("format", "low", "high"), [("int4", 18.5, 20.5), ("e4m3", 31, 33)])
def test_signal_to_noise_on_gaussian_weights(format, low, high):
    """19-20 dB for int4 groups of 128; e4m3 keeps 3 mantissa bits, about 32 dB."""
    x = np.float64(np.random.default_rng(1).standard_normal((256, 512)))
    q = call(quantise, {"x": jnp.asarray(x, jnp.float32), "recipe": WEIGHTS[format]})
    noise = np.float64(jit(dequantise)(q)) - x
    assert low < 10 * np.log10((x**2).mean() / (noise**2).mean()) < high


def test_leading_axes_are_indexed_together():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 130, 140)), jnp.float32)
    q = call(quantise, {"x": x, "recipe": quant.FP8_BLOCK})
    real = np.asarray(jit(dequantise)(q))
    for index in (1, (2, 0), slice(1), ...):
        assert_equal(jit(dequantise)(q[index]), real[index])


def test_a_scan_over_stacked_weights_slices_values_and_scales():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 130, 140)), jnp.float32)
    q = call(quantise, {"x": x, "recipe": quant.INT4_GROUP})
    _, real = jit(lambda q: jax.lax.scan(lambda c, w: (c, dequantise(w)), 0, q))(q)
    assert_equal(real, jit(dequantise)(q))


def test_arrays_pass_through():
    x = jnp.ones((2, 3), jnp.bfloat16)
    assert dequantise(x).dtype == jnp.float32
    assert isinstance(quantise(x, quant.FP8_TENSOR), QTensor)
