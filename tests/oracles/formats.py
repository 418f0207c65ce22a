"""e4m3, e8m0, int4 and their block scales, bit by bit in NumPy.

Imports nothing of ours, and rounds by looking up the nearest value in a table built from the
format's definition, so that no cast of a library is trusted.
"""

import math

import numpy as np


def e4m3_value(code: int) -> float:
    """Value of a byte: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no inf, all ones NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3_value(code) for code in range(127)])
"""The finite values from 0 to 448; index = code."""


def to_e4m3(x) -> np.ndarray:
    """uint8 codes nearest to x, ties to the even code, beyond 448 saturated, NaN kept."""
    x = np.float64(x)
    size = np.minimum(np.abs(x), 448.0)
    high = np.clip(np.searchsorted(E4M3, np.nan_to_num(size)), 1, 126)
    low = high - 1
    up, down = E4M3[high] - size, size - E4M3[low]
    code = np.where((up < down) | ((up == down) & (high % 2 == 0)), high, low)
    code = np.where(np.isnan(x), 127, code) | np.where(np.signbit(x), 0x80, 0)
    return code.astype(np.uint8)


def from_e4m3(codes) -> np.ndarray:
    """float64 values of uint8 codes."""
    return np.array([e4m3_value(code) for code in range(256)])[codes]


def power_above(scale: float) -> float:
    """Smallest power of two that is not below `scale`, exactly."""
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def int4_pack(q) -> np.ndarray:
    """int [..., K] in -8..7 -> uint8 [..., K / 2]: two's complement nibbles, even column low."""
    q = np.asarray(q, np.int64) % 16
    return (q[..., 0::2] + 16 * q[..., 1::2]).astype(np.uint8)


def int4_unpack(packed) -> np.ndarray:
    """Inverse of `int4_pack`, int64."""
    packed = np.asarray(packed, np.int64)
    both = np.stack([packed % 16, packed // 16], axis=-1).reshape(*packed.shape[:-1], -1)
    return both - 16 * (both >= 8)


def blocks(shape, block):
    """Slices of [N, K] that share a scale, with their index; the last ones may be ragged."""
    (n, k), (bn, bk) = shape, block
    for i in range(-(-n // bn)):
        for j in range(-(-k // bk)):
            yield (i, j), (slice(i * bn, min((i + 1) * bn, n)), slice(j * bk, min((j + 1) * bk, k)))


def dequantise(values, scales, block, fmt: str) -> np.ndarray:
    """Real values [..., N, K] in float64: each block times its multiplier."""
    real = int4_unpack(values) if fmt == "int4" else from_e4m3(values.view(np.uint8))
    real = np.float64(real)
    flat, s = real.reshape(-1, *real.shape[-2:]), scales.reshape(-1, *scales.shape[-2:])
    for matrix, scale in zip(flat, s, strict=True):
        for at, part in blocks(matrix.shape, block):
            matrix[part] *= np.float64(scale[at])
    return real


def block_amax(x, block, floor: float) -> np.ndarray:
    """float32 [..., ceil(N / bn), ceil(K / bk)]: largest magnitudes, at least floor."""
    x = np.float32(x)
    flat = np.abs(x.reshape(-1, *x.shape[-2:]))
    rows, cols = -(-x.shape[-2] // block[0]), -(-x.shape[-1] // block[1])
    out = np.empty((len(flat), rows, cols), np.float32)
    for matrix, result in zip(flat, out, strict=True):
        for at, part in blocks(matrix.shape, block):
            result[at] = max(matrix[part].max(), np.float32(floor))
    return out.reshape(*x.shape[:-2], rows, cols)
