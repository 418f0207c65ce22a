"""Arrays while they are being filled: one buffer for each distinct part that a device will hold.

All buffers of a load exist before the first value is read. On CPU devices a buffer is NumPy memory
that becomes the JAX array without a copy; replicas share it. Elsewhere it is an array of the device
that is updated in place, so that the host never holds more than the rows in flight.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGN = 64  # a NumPy buffer aligned like this becomes a JAX array of a CPU without a copy

Box = tuple[slice, ...]
"""A part of an array: one slice with explicit bounds an axis."""


class Part:
    """One distinct part of an array, on one or more devices of this process.

    Attributes:
        box: which part.
    """

    def __init__(self, box: Box, dtype: np.dtype, devices: Sequence[Any]):
        self.box = box
        self._devices = devices
        shape = tuple(s.stop - s.start for s in box)
        self._host = _aligned(shape, dtype) if all(map(_is_host, devices)) else None
        self._arrays = []
        if self._host is None:
            self._arrays = [jnp.zeros(shape, dtype, device=device) for device in devices]
        self._lock = threading.Lock()

    def target(self, index: tuple[int, ...], start: int, stop: int) -> np.ndarray | None:
        """Memory of rows `start:stop` (of the part) below `index` (of the whole array), with all
        their columns; None when it is not the host's.
        """
        if self._host is None:
            return None
        return self._host[self._inside(index)][start:stop]

    def put(self, index: tuple[int, ...], start: int, rows: np.ndarray) -> None:
        """Stores rows, with the columns of this part, from row `start` of the part on."""
        if self._host is not None:
            self._host[self._inside(index)][start : start + len(rows)] = rows
            return
        inside = self._inside(index)
        values = rows[(None,) * len(inside)]
        at = (*inside, start, *(0,) * (rows.ndim - 1))
        on_devices = [jax.device_put(values, device) for device in self._devices]
        with self._lock:
            self._arrays = [
                _update(array, new, tuple(map(np.int32, at)))
                for array, new in zip(self._arrays, on_devices, strict=True)
            ]
        jax.block_until_ready(on_devices)  # or rows without end would wait for their transfer

    def arrays(self) -> list[jax.Array]:
        """The part on each of its devices; nothing may be stored afterwards."""
        if self._host is None:
            return self._arrays
        return [jax.device_put(self._host, device) for device in self._devices]

    def covers(self, index: tuple[int, ...]) -> bool:
        """Whether the part has something below these leading indices of the whole array."""
        lead = self.box[: len(index)]
        return all(s.start <= i < s.stop for s, i in zip(lead, index, strict=True))

    def _inside(self, index: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - s.start for i, s in zip(index, self.box, strict=False))


class Buffer:
    """One array on its way to its devices.

    Args:
        shape: shape of the whole array.
        dtype: its dtype.
        sharding: where its parts go; this process holds no others. None: the first device.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
    ):
        self._shape, self._sharding = shape, sharding
        placed: list[tuple[Any, Box]] = [(None, _box((slice(None),) * len(shape), shape))]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
            placed = [(d, _box(index, shape)) for d, index in indices.items() if index is not None]
        devices: dict[tuple, list[Any]] = {}
        for device, box in placed:
            devices.setdefault(_bounds(box), []).append(device)
        boxes = {_bounds(box): box for _, box in placed}
        self._parts = [Part(box, dtype, devices[key]) for key, box in boxes.items()]

    def rows(self, index: tuple[int, ...]) -> Iterator[tuple[int, int, list[Part]]]:
        """(first row, row after the last, parts that hold them) below leading indices."""
        found: dict[tuple[int, int], list[Part]] = {}
        for part in self._parts:
            if part.covers(index):
                rows = part.box[len(index)]
                found.setdefault((rows.start, rows.stop), []).append(part)
        for (start, stop), parts in found.items():
            yield start, stop, parts

    def finish(self) -> jax.Array:
        """The array, complete on its devices. The buffer must not be used afterwards."""
        arrays = [array for part in self._parts for array in part.arrays()]
        self._parts = []
        if self._sharding is None:
            return jax.block_until_ready(arrays[0])
        whole = jax.make_array_from_single_device_arrays(self._shape, self._sharding, arrays)
        return jax.block_until_ready(whole)


def _box(index: Box, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*i.indices(n)) for i, n in zip(index, shape, strict=True))


def _bounds(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in box)


def _is_host(device: Any) -> bool:
    """Whether arrays of a device (None: the default one) are memory of this process."""
    if device is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
    return getattr(device, "platform", device) == "cpu"  # a default may be just a platform's name


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, rows: jax.Array, at: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, rows, at)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGN, np.uint8)  # NumPy asks for huge pages where it is worth it
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + nbytes].view(dtype).reshape(shape)
