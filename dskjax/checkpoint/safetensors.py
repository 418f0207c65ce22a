"""The safetensors file format, read by byte ranges and trusted in nothing.

    u64 LE header length | JSON {name: {dtype, shape, data_offsets}, "__metadata__": ..} | data

Offsets count from the first data byte. Tensors cover the data exactly: no gap, no overlap, nothing
after the last. Opening a file checks all of that, so reading a tensor cannot go wrong afterwards,
short of the file changing meanwhile. Which tensors a model needs is the business of `hf`.
"""

import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000
"""Longest header accepted, in bytes; the limit of the reference implementation."""

_MAX_IO = 1 << 30  # Linux moves at most 2 GiB a call
_MAX_RANK = 64  # NumPy's limit

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_CODES = {np.dtype(dtype): code for code, dtype in _NUMPY.items()}


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, hostile or not what its config says. Nothing loads."""


def numpy_dtype(code: str) -> np.dtype:
    """NumPy dtype of a safetensors dtype code such as "BF16".

    Raises:
        NotImplementedError: NumPy has no such type (sub-byte floats).
    """
    if code not in _NUMPY:
        raise NotImplementedError(f"tensors of dtype {code} cannot be read into NumPy")
    return np.dtype(_NUMPY[code])


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from untrusted bytes: UTF-8, no key twice, no NaN, not too deep.

    Args:
        raw: the bytes.
        where: what they are, to start the error message with.

    Raises:
        CheckpointError: anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{where}: key {name!r} occurs twice in one JSON object")
            found[name] = value
        return found

    def constant(text: str) -> Any:
        raise CheckpointError(f"{where}: {text} is not JSON")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not readable as UTF-8 JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: dtype code, shape, offset from the start of the file, bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open file, with its header checked.

    Attributes:
        path: the file.
        entries: tensors by name.
        metadata: the free-form strings of `__metadata__`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
                raise CheckpointError(f"{path}: not a regular file")
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading afterwards fails."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor, or the rows `start:stop` of its first axis.

        Args:
            name: a key of `entries`.
            start: first row.
            stop: row after the last; None reads to the end. A tensor without axes is one row.
            out: where to put them: C-contiguous, with the tensor's dtype and as many bytes. A new
                array of the tensor's shape when None.

        Raises:
            CheckpointError: the file ends early (it changed since it was opened).
        """
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else stop
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        dtype = numpy_dtype(entry.dtype)
        if out is None:
            out = np.empty(shape, dtype)
        row = entry.nbytes // rows if rows else 0
        assert 0 <= start <= stop <= rows, (name, start, stop, rows)
        assert out.dtype == dtype and out.nbytes == row * (stop - start), (
            name,
            out.dtype,
            out.shape,
        )
        assert out.flags.c_contiguous, name
        if out.nbytes:
            self._fill(memoryview(out.reshape(-1).view(np.uint8)), entry.offset + start * row, name)
        return out

    def _fill(self, target: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self._fd, [target[done : done + _MAX_IO]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading {what}: {error.strerror}") from error
            if not got:
                raise CheckpointError(
                    f"{self.path}: the file ends inside {what}: "
                    f"expected {len(target)} bytes at {offset}, found {done}"
                )
            done += got

    def _read_header(self) -> None:
        size = os.fstat(self._fd).st_size
        if size < 8:
            raise CheckpointError(
                f"{self.path}: holds {size} bytes; expected 8 bytes of header length first"
            )
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "the header length")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or length > size - 8:
            raise CheckpointError(
                f"{self.path}: the header claims {length} bytes; expected at most "
                f"{min(MAX_HEADER, size - 8)} in a file of {size}: truncated, or not safetensors"
            )
        raw = bytearray(length)
        self._fill(memoryview(raw), 8, "the header")
        header = parse_object(bytes(raw), f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__ must map strings to strings")
        self.metadata = metadata
        for name, fields in header.items():
            self.entries[name] = self._entry(name, fields, 8 + length, size)
        self._check_cover(8 + length, size)

    def _entry(self, name: str, fields: Any, data: int, size: int) -> Entry:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
            raise CheckpointError(
                f"{where}: expected dtype, shape and data_offsets, found {fields!r}"
            )
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(_BITS)}")
        if not isinstance(shape, list) or not all(
            type(n) is int and 0 <= n < 1 << 63 for n in shape
        ):
            raise CheckpointError(
                f"{where}: shape {shape!r} is not a list of non-negative integers"
            )
        if len(shape) > _MAX_RANK:
            raise CheckpointError(f"{where}: {len(shape)} axes; expected at most {_MAX_RANK}")
        if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
            raise CheckpointError(f"{where}: data_offsets {offsets!r} are not two integers")
        begin, end = offsets
        if not 0 <= begin <= end:
            raise CheckpointError(f"{where}: data_offsets {offsets!r} must be 0 <= begin <= end")
        if end > size - data:
            raise CheckpointError(
                f"{where}: ends at data byte {end}, but the file has {size - data} data bytes; "
                "it is truncated"
            )
        bits = math.prod(shape) * _BITS[dtype]
        if bits != 8 * (end - begin):
            raise CheckpointError(
                f"{where}: shape {shape!r} of {dtype} needs {bits / 8:g} bytes, but data_offsets "
                f"{offsets!r} hold {end - begin}"
            )
        return Entry(dtype, tuple(shape), data + begin, end - begin)

    def _check_cover(self, data: int, size: int) -> None:
        at, last = data, "the header"
        for name, entry in sorted(
            self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)
        ):
            if entry.offset != at:
                kind = "overlap" if entry.offset < at else "leave a gap"
                raise CheckpointError(
                    f"{self.path}: tensors {last!r} and {name!r} {kind}: "
                    f"expected data byte {at - data}, found {entry.offset - data}"
                )
            at, last = entry.offset + entry.nbytes, name
        if at != size:
            raise CheckpointError(
                f"{self.path}: {size - at} bytes follow the last tensor {last!r}; expected none"
            )


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to write: what the header needs, and a call that makes the values in their turn."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Sequence[Pending], metadata: dict[str, str] | None = None) -> None:
    """Writes a file and flushes it to the disk; tensors are made and written one by one.

    They are made in the order given. In the file wider dtypes come first, so that every tensor is
    aligned to its element size.

    Args:
        path: a file that does not exist yet.
        tensors: what to write, each name once.
        metadata: strings for `__metadata__`.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in ordered:
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {tensor.name!r}: safetensors has no dtype {tensor.dtype}")
        assert tensor.name not in header, tensor.name
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            file.seek(8 + len(raw) + header[tensor.name]["data_offsets"][0])
            value = np.ascontiguousarray(tensor.make())
            assert value.dtype == tensor.dtype and value.size * value.itemsize == tensor.nbytes, (
                tensor
            )
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
