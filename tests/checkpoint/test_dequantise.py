"""Codes times scales, to the bit what NumPy makes of them."""

import ml_dtypes
import numpy as np
import pytest

from dskjax.checkpoint import dequantise as module
from dskjax.checkpoint.dequantise import dequantise

E4M3 = ml_dtypes.float8_e4m3fn
DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]


def want(codes, scales, columns, dtype):
    """One value after the other, by tables."""
    if codes.dtype == E4M3:
        real = codes.astype(np.float32)
    else:
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(int)
        real = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)
    wide = np.repeat(scales, columns, axis=1)[:, : real.shape[1]]
    with np.errstate(over="ignore"):
        return (real * wide).astype(dtype)


def check(codes, scales, columns, dtype):
    expected = want(codes, scales, columns, dtype)
    found = np.empty_like(expected)
    dequantise(codes, scales, columns, found)
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    bits = f"u{found.itemsize}"
    np.testing.assert_array_equal(found.view(bits)[~nan], expected.view(bits)[~nan])
    return nan


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_many_scales(dtype):
    codes = np.tile(np.arange(256, dtype=np.uint8).view(E4M3), (512, 1))
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.uniform(-9, 9, (512, 2))).astype(np.float32)
    scales[::2] = scales[::2].astype(ml_dtypes.bfloat16)  # then products are halfway more often
    nan = check(codes, scales, 128, dtype)
    assert nan.sum() == 2 * len(codes)  # 0x7F and 0xFF


@pytest.mark.parametrize("columns", [4, 32, 128, 256, 300])
@pytest.mark.parametrize("width", [1, 127, 300, 512])
@pytest.mark.parametrize("form", ["e4m3", "int4"])
def test_widths_that_scales_do_not_divide(form, width, columns, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 1024)
    width += width % 2 if form == "int4" else 0
    rng = np.random.default_rng(width + columns)
    codes = rng.integers(0, 256, (37, width // (2 if form == "int4" else 1))).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (37, -(-width // columns))).astype(np.float32)
    check(codes.view(E4M3) if form == "e4m3" else codes, scales, columns, ml_dtypes.bfloat16)


def test_ties_go_to_even_neighbours():
    codes = np.full((1, 128), 1.0, E4M3)
    found = np.empty((2, 128), ml_dtypes.bfloat16)
    halfway = np.float32([[1 + 2.0**-8], [1 + 3 * 2.0**-8]])
    dequantise(np.repeat(codes, 2, axis=0), halfway, 128, found)
    np.testing.assert_array_equal(found[:, 0].astype(np.float32), [1, 1 + 4 * 2.0**-8])
