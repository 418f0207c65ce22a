"""One leaf of params: the buffers it fills, the jobs that fill them, and what it becomes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dskjax.axes import Sharding
from dskjax.checkpoint import sources
from dskjax.checkpoint.buffers import Buffer, Part
from dskjax.checkpoint.shards import Shards
from dskjax.checkpoint.sources import Source
from dskjax.checkpoint.stored import Stored
from dskjax.checkpoint.stream import Job
from dskjax.params import WeightSpec
from pallas_kernels.quant import Format, QTensor, Weight

_CHUNK = 8 << 20  # bytes of memory that a job takes, unless a single row takes more


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf on its way.

    Attributes:
        buffers: of the array; of values and scales when it stays quantized.
        jobs: what fills them.
        kind: format and block of the `QTensor`; None for an array.
    """

    buffers: tuple[Buffer, ...]
    jobs: list[Job]
    kind: tuple[Format, tuple[int, int]] | None = None

    def finish(self) -> Weight:
        """The leaf, once all jobs are done; its buffers are used up."""
        arrays = [buffer.finish() for buffer in self.buffers]
        if self.kind is None:
            return arrays[0]
        values, scales = arrays
        return QTensor(values, scales, self.kind[1], self.kind[0])


def floats(
    shards: Shards,
    weights: Sequence[Stored],
    spec: WeightSpec,
    dtype: np.dtype,
    order: np.ndarray | None,
    sharding: Sharding | None,
) -> Leaf:
    """A leaf as one array of floats; weights that are quantized in the files are dequantised.

    Args:
        shards: the open files.
        weights: what fills the leaf, settled by `inventory`.
        spec: the leaf's shape and axes.
        dtype: dtype of the array.
        order: which stored row each row is; None: all stay where they are.
        sharding: where the parts go; None: the first device.
    """
    buffer = Buffer(spec.shape, dtype, sharding and sharding.of(spec.axes, spec.shape))
    jobs = []
    for stored in weights:
        # A tensor with merged axes (fused experts) has our first axis, and the same bytes a row.
        shape = spec.shape[len(stored.slot.index) :]
        if stored.form == "plain":
            source = sources.plain(shards, stored.values, shape, dtype)
        else:
            source = sources.dequantised(shards, stored, dtype)
        jobs += _fill(shards, buffer, stored, _in_order(source, order))
        jobs += _checks(shards, stored)
    return Leaf((buffer,), jobs)


def quantised(
    shards: Shards,
    weights: Sequence[Stored],
    spec: WeightSpec,
    order: np.ndarray | None,
    sharding: Sharding | None,
) -> Leaf:
    """A leaf as a `QTensor`, bit for bit; see `floats`. All weights are of one kind.

    Values and scales are sharded as `Sharding.quantised` says, which raises where a part would end
    inside a block.
    """
    kind = weights[0].kind
    assert kind is not None
    parts = (sources.codes(shards, weights[0]), sources.scales(shards, weights[0]))
    lead = spec.shape[:-2]
    whole: Any = [jax.ShapeDtypeStruct((*lead, *part.shape), part.dtype) for part in parts]
    places: Any = (None, None)
    if sharding is not None:
        leaf = QTensor(whole[0], whole[1], kind[1], kind[0])
        placed: Any = sharding.quantised(spec.axes, leaf, weights[0].slot.leaf)
        places = (placed.values, placed.scales)
    buffers = tuple(
        Buffer(array.shape, array.dtype, place) for array, place in zip(whole, places, strict=True)
    )
    # Where a block has several rows, they move inside of it and it keeps its scale.
    scale_order = order if kind[1][0] == 1 else None
    jobs = []
    for stored in weights:
        values = _in_order(sources.codes(shards, stored), order)
        jobs += _fill(shards, buffers[0], stored, values)
        multipliers = _in_order(sources.scales(shards, stored), scale_order)
        jobs += _fill(shards, buffers[1], stored, multipliers)
        jobs += _checks(shards, stored)
    return Leaf(buffers, jobs, kind)


def _in_order(source: Source, order: np.ndarray | None) -> Source:
    return source if order is None else sources.reordered(source, order)


def _fill(shards: Shards, buffer: Buffer, stored: Stored, source: Source) -> Iterator[Job]:
    index, total = stored.slot.index, source.shape[0]
    file, offset = shards.place(source.tensors[0])
    nbytes = [shards.entry(name).nbytes for name in source.tensors]
    step = max(1, _CHUNK // source.row_cost)
    for start, stop, parts in buffer.rows(index):
        for first in range(start, stop, step):
            last = min(first + step, stop)
            place = (file, offset + first * nbytes[0] // total)
            run = functools.partial(_read, source, parts, index, first, last)
            yield Job(place, (last - first) * sum(nbytes) // total, run)


def _read(
    source: Source, parts: Sequence[Part], index: tuple[int, ...], first: int, last: int
) -> None:
    """Reads rows once and stores each part's columns of them."""
    at = first - parts[0].box[len(index)].start
    shape = (last - first, *source.shape[1:])
    memory = parts[0].target(index, at, at + last - first)
    if len(parts) == 1 and memory is not None and memory.shape == shape:
        source.fill(first, last, memory)
        return
    rows = np.empty(shape, source.dtype)
    source.fill(first, last, rows)
    for part in parts:
        part.put(index, at, rows[(slice(None), *part.box[len(index) + 1 :])])


def _checks(shards: Shards, stored: Stored) -> Iterator[Job]:
    if stored.declared is not None:
        run = functools.partial(sources.check_declared, shards, stored)
        yield Job(shards.place(stored.declared), shards.entry(stored.declared).nbytes, run)
