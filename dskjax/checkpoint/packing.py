"""Quantized values as checkpoints lay them out on disk <-> the one layout of a `QTensor`.

A `QTensor` holds int4 as uint8 [N, K / 2]: two's complement nibbles along K, the even column low.
Public formats differ in the container, in the axis they pack along and in the sign:

    W4AFP8           int8 [N, K / 2]         the same bytes
    pack-quantized   int32 [N, ceil(K / 8)]  column 8w + i at bits 4i of word w, value + 8
    ModelOpt AWQ     uint8 [N / 2, K]        rows 2j (low nibble) and 2j + 1 (high) in one byte

Everything here is exact. Words are those of a little-endian machine, as are the files.
"""

import numpy as np
from jaxtyping import Float32, Int8, Int32, UInt8

_OFFSET = np.uint8(0x88)  # value + 8 in four bits is two's complement with the top bit flipped


def int4_from_int8(stored: Int8[np.ndarray, "*n half"]) -> UInt8[np.ndarray, "*n half"]:
    """W4AFP8 to canonical nibbles; a view of the same bytes."""
    return stored.view(np.uint8)


def int8_from_int4(packed: UInt8[np.ndarray, "*n half"]) -> Int8[np.ndarray, "*n half"]:
    """The inverse of `int4_from_int8`."""
    return packed.view(np.int8)


def int4_from_words(words: Int32[np.ndarray, "*n words"], k: int) -> UInt8[np.ndarray, "*n half"]:
    """Offset-binary words of compressed-tensors to canonical nibbles.

    Args:
        words: int32 [..., N, ceil(K / 8)]; nibbles beyond K are padding.
        k: number of columns, even.
    """
    assert k % 2 == 0 and words.shape[-1] == -(-k // 8), (words.shape, k)
    return np.ascontiguousarray(words).view(np.uint8)[..., : k // 2] ^ _OFFSET


def words_from_int4(packed: UInt8[np.ndarray, "*n half"]) -> Int32[np.ndarray, "*n words"]:
    """The inverse of `int4_from_words`; the last word is filled up with zero bits, as
    compressed-tensors does.
    """
    *lead, half = packed.shape
    padded = np.zeros((*lead, -(-half // 4) * 4), np.uint8)
    np.bitwise_xor(packed, _OFFSET, out=padded[..., :half])
    return padded.view(np.int32)


def int4_from_row_pairs(
    pairs: UInt8[np.ndarray, "*pairs k"],
) -> UInt8[np.ndarray, "*n half"]:
    """ModelOpt's pairs of rows to canonical nibbles: uint8 [..., N / 2, K] -> [..., N, K / 2]."""
    *lead, half_n, k = pairs.shape
    assert k % 2 == 0, pairs.shape
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    out = np.empty((*lead, half_n, 2, k // 2), np.uint8)
    out[..., 0, :] = (even & 15) | (odd << 4)
    out[..., 1, :] = (even >> 4) | (odd & 0xF0)
    return out.reshape(*lead, 2 * half_n, k // 2)


def scales_to_float32(scales: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Scales of any stored dtype (float32, bfloat16, float16, float8_e8m0fnu) as float32, exactly.

    E8M0 is a power of two, 2^(byte - 127); byte 255 is NaN.
    """
    return scales.astype(np.float32)
