"""Rows of a weight as arrays in memory hold them, read from the tensors of a checkpoint."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from dskjax.checkpoint.dequantise import dequantise
from dskjax.checkpoint.packing import int4_from_row_pairs, int4_from_words, scales_to_float32
from dskjax.checkpoint.safetensors import CheckpointError, numpy_dtype
from dskjax.checkpoint.shards import Shards
from dskjax.checkpoint.stored import Stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One matrix (or vector, or stack of matrices) that can be read by rows of its first axis.

    Attributes:
        tensors: names of what is read; the place of the first in its file is the source's turn.
        shape: shape of all rows together.
        dtype: dtype of the rows.
        row_cost: bytes of memory that a row takes while it is read.
        fill: `fill(start, stop, out)` writes rows `start:stop` to `out`, which is C-contiguous
            [stop - start, *shape[1:]]. Raises CheckpointError when the values cannot be used, or
            the file ends early.
    """

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    row_cost: int
    fill: Callable[[int, int, np.ndarray], None]


def plain(shards: Shards, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Source:
    """A tensor of floats, cast where its dtype is another. Axes of `shape` but for the first may be
    merged in it.
    """
    return Source(
        tensors=(name,),
        shape=shape,
        dtype=dtype,
        row_cost=shards.entry(name).nbytes // shape[0],
        fill=functools.partial(_fill_plain, shards, name),
    )


def codes(shards: Shards, stored: Stored) -> Source:
    """Quantized values in the layout of a `QTensor`: e4m3 [N, K], or int4 as uint8 [N, K / 2]."""
    n, k = stored.slot.shape
    width = k if stored.form == "fp8" else k // 2
    return Source(
        tensors=(stored.values,),
        shape=(n, width),
        dtype=numpy_dtype("F8_E4M3" if stored.form == "fp8" else "U8"),
        row_cost=width,
        fill=functools.partial(_fill_codes, shards, stored),
    )


def scales(shards: Shards, stored: Stored) -> Source:
    """The scales as float32; all of them must be finite."""
    assert stored.scales is not None
    shape = stored.scales_shape()
    return Source(
        tensors=(stored.scales,),
        shape=shape,
        dtype=np.dtype(np.float32),
        row_cost=8 * shape[1],
        fill=functools.partial(_fill_scales, shards, stored.scales),
    )


def dequantised(shards: Shards, stored: Stored, dtype: np.dtype) -> Source:
    """A quantized weight as floats: scaled in float32, cast last."""
    assert stored.scales is not None
    return Source(
        tensors=(stored.values, stored.scales),
        shape=stored.slot.shape,
        dtype=dtype,
        # Codes, and float32 values where `columns` scales them.
        row_cost=(1 if stored.columns is None else 9) * stored.slot.shape[1],
        fill=functools.partial(_fill_dequantised, shards, stored),
    )


def reordered(source: Source, order: np.ndarray) -> Source:
    """Another source with its rows in another order: row i is its row `order[i]`."""
    return dataclasses.replace(
        source,
        row_cost=2 * source.row_cost,
        fill=functools.partial(_fill_reordered, source, order),
    )


def check_declared(shards: Shards, stored: Stored) -> None:
    """Raises CheckpointError when `weight_shape` is not the shape that the config implies."""
    assert stored.declared is not None
    found = shards.read(stored.declared).tolist()
    if found != list(stored.slot.shape):
        raise CheckpointError(
            f"{shards.file(stored.declared)}: tensor {stored.declared!r} says {found}; "
            f"expected {list(stored.slot.shape)} from config.json"
        )


def _fill_plain(shards: Shards, name: str, start: int, stop: int, out: np.ndarray) -> None:
    stored = numpy_dtype(shards.entry(name).dtype)
    if stored == out.dtype:
        shards.read(name, start, stop, out)
    else:
        out[...] = shards.read(name, start, stop, np.empty(out.shape, stored))


def _fill_codes(shards: Shards, stored: Stored, start: int, stop: int, out: np.ndarray) -> None:
    if stored.form == "fp8":
        shards.read(stored.values, start, stop, out)
    elif stored.form == "int8":  # the same bytes
        shards.read(stored.values, start, stop, out.view(np.int8))
    elif stored.form == "words":
        words = shards.read(stored.values, start, stop)
        out[...] = int4_from_words(words, stored.slot.shape[1])
    else:
        first = start // 2
        rows = int4_from_row_pairs(shards.read(stored.values, first, -(-stop // 2)))
        out[...] = rows[start - 2 * first : stop - 2 * first]


def _fill_scales(shards: Shards, name: str, start: int, stop: int, out: np.ndarray) -> None:
    out[...] = scales_to_float32(shards.read(name, start, stop))
    _check_finite(shards, name, start, out)


def _fill_dequantised(
    shards: Shards, stored: Stored, start: int, stop: int, out: np.ndarray
) -> None:
    packed = _rows(codes(shards, stored), start, stop)
    rows, columns = stored.block
    first = start // rows
    blocks = _rows(scales(shards, stored), first, -(-stop // rows))
    of_rows = blocks[np.arange(start, stop) // rows - first]
    if stored.columns is None:
        dequantise(packed, of_rows, columns, out)
        return
    factors = shards.read(stored.columns).astype(np.float32)
    _check_finite(shards, stored.columns, 0, factors)
    real = np.empty(out.shape, np.float32)
    dequantise(packed, of_rows, columns, real)
    out[...] = real * factors


def _fill_reordered(
    source: Source, order: np.ndarray, start: int, stop: int, out: np.ndarray
) -> None:
    picked = order[start:stop]
    first = int(picked.min())  # the last is near: rows move within their head
    out[...] = _rows(source, first, int(picked.max()) + 1)[picked - first]


def _rows(source: Source, start: int, stop: int) -> np.ndarray:
    rows = np.empty((stop - start, *source.shape[1:]), source.dtype)
    source.fill(start, stop, rows)
    return rows


def _check_finite(shards: Shards, name: str, start: int, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        at = np.unravel_index(np.argmin(finite), finite.shape)
        place = [start + int(at[0]), *map(int, at[1:])]
        raise CheckpointError(
            f"{shards.file(name)}: tensor {name!r} holds {values[at]} at {place}; "
            "expected finite scales only: the file is damaged"
        )
