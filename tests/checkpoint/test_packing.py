"""Quantized values between disk and `QTensor`: bit for bit, against values written by hand."""

import ml_dtypes
import numpy as np
import pytest

from dskjax.checkpoint import packing
from tests.oracles import formats

VALUES = np.array([[-8, -1, 0, 7]])
ALL = np.arange(-8, 8)


def draw(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(n * k).integers(-8, 8, (n, k))


def words_by_hand(q: np.ndarray) -> np.ndarray:
    """value + 8 of column 8w + i at bits 4i of word w, in Python integers."""
    n, k = q.shape
    out = np.zeros((n, -(-k // 8)), np.uint32)
    for row in range(n):
        for column in range(k):
            out[row, column // 8] |= np.uint32((int(q[row, column]) + 8) << 4 * (column % 8))
    return out.view(np.int32)


def pairs_by_hand(q: np.ndarray) -> np.ndarray:
    """Rows 2j and 2j + 1 in one byte, the even row low."""
    return (q[0::2] % 16 + 16 * (q[1::2] % 16)).astype(np.uint8)


def test_published_vectors():
    canonical = formats.int4_pack(VALUES)
    assert canonical.tolist() == [[0xF8, 0x70]]
    stored = np.array([[0xF8, 0x70]], np.uint8).view(np.int8)
    assert packing.int4_from_int8(stored).tolist() == canonical.tolist()
    words = np.array([[0xF870]], np.int32)
    assert packing.int4_from_words(words, 4).tolist() == canonical.tolist()
    assert packing.words_from_int4(canonical).tolist() == words.tolist()


@pytest.mark.parametrize("shape", [(1, 8), (3, 16), (2, 14), (5, 2), (7, 128), (2, 100)])
def test_words_hold_offset_binary_columns(shape):
    q = draw(*shape)
    words = words_by_hand(q)
    canonical = packing.int4_from_words(words, shape[1])
    assert canonical.dtype == np.uint8 and canonical.tolist() == formats.int4_pack(q).tolist()
    assert packing.words_from_int4(canonical).tolist() == words.tolist()


def test_padding_of_the_last_word_is_not_read():
    q = draw(3, 12)
    words = words_by_hand(q) | np.int32(-65536) * np.array([0, 1], np.int32)  # ones beyond K
    assert packing.int4_from_words(words, 12).tolist() == formats.int4_pack(q).tolist()


@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (6, 128)])
def test_row_pairs_become_rows(shape):
    q = draw(*shape)
    found = packing.int4_from_row_pairs(pairs_by_hand(q))
    assert found.dtype == np.uint8 and found.tolist() == formats.int4_pack(q).tolist()


def test_every_byte_goes_both_ways():
    q = np.stack(np.meshgrid(ALL, ALL, indexing="ij"), -1).reshape(16, 32)
    canonical = formats.int4_pack(q)
    assert sorted(canonical.reshape(-1)) == list(range(256))
    stored = packing.int8_from_int4(canonical)
    assert stored.dtype == np.int8 and np.shares_memory(stored, canonical)
    assert packing.int4_from_int8(stored).tolist() == canonical.tolist()
    assert packing.int4_from_words(packing.words_from_int4(canonical), 32).tolist() == (
        canonical.tolist()
    )
    assert packing.int4_from_row_pairs(pairs_by_hand(q)).tolist() == canonical.tolist()


def test_leading_axes_are_kept():
    q = draw(12, 16).reshape(2, 3, 2, 16)
    words = words_by_hand(q.reshape(12, 16)).reshape(2, 3, 2, 2)
    canonical = formats.int4_pack(q)
    assert np.array_equal(packing.int4_from_words(words, 16), canonical)
    assert np.array_equal(packing.words_from_int4(canonical), words)
    pairs = np.stack([pairs_by_hand(part) for part in q.reshape(6, 2, 16)]).reshape(2, 3, 1, 16)
    assert np.array_equal(packing.int4_from_row_pairs(pairs), canonical)


def test_scales_of_every_dtype_become_the_same_float32():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        stored = np.array([0.5, 3, -1.25], dtype)
        found = packing.scales_to_float32(stored)
        assert found.dtype == np.float32 and found.tolist() == [0.5, 3, -1.25]
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)
    found = packing.scales_to_float32(every)
    assert found[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert np.isnan(found[255])
