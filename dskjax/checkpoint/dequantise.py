"""Floats from quantized values on the host, as fast as its memory: compiled, a piece at a time.

NumPy would look every value up and cast it with another loop: several times as long.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quant import unpack_int4

_PIECE = 2**19
"""Values that are converted at a time: they stay in the cache, and all rows of a weight are one
compiled shape.
"""
_RUN = 128
"""Values that share a scale, in pieces of wider blocks."""


def dequantise(codes: np.ndarray, scales: np.ndarray, columns: int, out: np.ndarray) -> None:
    """Writes codes * scales to `out`, multiplied in float32 and cast last.

    Args:
        codes: e4m3 [N, K], or int4 as uint8 [N, K / 2] in the layout of a `QTensor`.
        scales: float32 [N, ceil(K / columns)].
        columns: values of a row that share a scale.
        out: [N, K] of any float dtype, C-contiguous.
    """
    n, k = out.shape
    per_value = codes.shape[1] / k
    run = _RUN if columns % _RUN == 0 else columns
    if k % run:
        whole = -(-k // run) * run
        padded = np.zeros((n, round(whole * per_value)), codes.dtype)
        padded[:, : codes.shape[1]] = codes
        wide = np.empty((n, whole), out.dtype)
        dequantise(padded, scales, columns, wide)
        out[...] = wide[:, :k]
        return
    runs = np.repeat(scales, columns // run, axis=1)[:, : k // run].reshape(-1, 1)
    codes, out = codes.reshape(len(runs), -1), out.reshape(len(runs), run)
    step = max(_PIECE // run, 1)
    with _on_host():
        for start in range(0, len(runs), step):
            here = slice(start, start + step)
            piece = _filled(codes[here], step), _filled(runs[here], step)
            out[here] = np.asarray(_scaled(*piece, out.dtype))[: len(out[here])]


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    if len(rows) == count:
        return rows
    filled = np.zeros((count, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return filled


@functools.partial(jax.jit, static_argnums=2)
def _scaled(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    if codes.dtype == jnp.uint8:
        return _cast(unpack_int4(codes).astype(jnp.float32) * scales, dtype)
    return _cast(_from_e4m3(codes) * scales, dtype)


def _from_e4m3(codes: jax.Array) -> jax.Array:
    """As `astype(float32)`, which takes twice as long on a CPU: float16 has the same fields, with
    one more bit of exponent, and processors convert it (subnormals too).
    """
    bits = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    magnitude = bits & 0x7F
    nan = jnp.where(magnitude == 0x7F, 0x7C00, 0).astype(jnp.uint16)
    half = ((bits & 0x80) << 8) | (magnitude << 7) | nan
    return lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 2.0**8


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """As `astype`, which is slower for bfloat16 because it expects NaN of any kind."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    even = (bits >> 16) & 1  # a tie goes to the even neighbour
    return lax.bitcast_convert_type(((bits + 0x7FFF + even) >> 16).astype(jnp.uint16), dtype)


def _on_host() -> Any:
    """Work goes to the CPU, whatever the default device; to that where JAX was told of no CPU."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()
