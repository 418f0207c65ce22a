"""Hugging Face checkpoint folders: `config.json` and safetensors, read bit for bit.

Loading settles every name, shape and dtype (`inventory`) before it reads a value, so what comes
back is complete, or an error. Values go from the files straight into the stacked arrays, of which
each device gets its own part only. The one change on the way: rotary rows that are stored
interleaved are put in half-split order (`names.row_order`). `save` writes them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from dskjax.axes import Sharding
from dskjax.checkpoint import inventory, names
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.safetensors import CheckpointError, numpy_dtype
from dskjax.checkpoint.shards import Shards, check_folder, read_json
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, named_leaves, tree_of

_TOO_LARGE = 2**31  # for any number in a config; from 2**62 on, shapes break inside JAX
_ALIGN = 64  # a NumPy buffer aligned like this becomes a JAX array of a CPU without a copy

Box = tuple[slice, ...]
"""A part of an array: one slice with explicit bounds an axis."""


def load_config(path: str | Path) -> ModelConfig:
    """The model that the `config.json` in a folder describes.

    Raises:
        CheckpointError: no folder, no file, no JSON, or a field that does not fit; names the file.
        NotImplementedError: a model that is recognised and not supported.
    """
    check_folder(Path(path))
    file = Path(path) / "config.json"
    config = read_json(file)
    for name, value in config.items():
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise CheckpointError(
                f"{file}: field {name!r} = {value}; expected less than {_TOO_LARGE}"
            )
    try:
        return ModelConfig.from_hf(config)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a value of odd type
        raise CheckpointError(f"{file}: {error}") from error


def load_hf(
    path: str | Path,
    *,
    dtype: Any | None = None,
    sharding: Sharding | None = None,
    progress: bool = False,
) -> tuple[Params, ModelConfig]:
    """Loads a checkpoint folder.

    MTP modules that the config declares but no file has a tensor of are dropped from the returned
    config, with a logged warning. Copies of the embedding and the head in MTP modules are not read.
    On a CPU the peak memory is the result and one tensor; on other devices the host holds one leaf
    at a time (its local parts, when sharded).

    Args:
        path: folder with `config.json` and `model.safetensors`, or the index and its shards.
        dtype: bfloat16, float16 or float32 for the params; None takes that of the stored embedding.
            Weights that fix their dtype (the gate's bias) keep it.
        sharding: where the parts go; a process reads no more than its own. None: the first device.
        progress: draw a progress bar.

    Returns:
        Params as `model.param_specs(config)` tells, and the config.

    Raises:
        CheckpointError: anything missing, unexpected, damaged or misshapen; names the file, the
            tensor, what was expected and what was found.
        NotImplementedError: a model or checkpoint of a kind that is recognised and not supported.
        ValueError: another `dtype`.
    """
    folder = Path(path)
    if dtype is not None and np.dtype(dtype) not in map(np.dtype, inventory.FLOATS.values()):
        raise ValueError(f"dtype={dtype} must be bfloat16, float16, float32 or None")
    cfg = load_config(folder)
    with Shards(folder) as shards:
        cfg = inventory.without_absent_mtp(shards, cfg)
        plan = inventory.plan(shards, cfg)
        target = numpy_dtype(shards.entry(names.EMBEDDING).dtype)
        if dtype is None:
            inventory.warn_of_narrowing(shards, cfg, plan, target)
        else:
            target = np.dtype(dtype)
        readers = {
            leaf: _LeafReader(
                shards,
                plan[leaf],
                spec.shape,
                np.dtype(spec.dtype or target),
                names.row_order(leaf, cfg),
                sharding.of(spec.axes, spec.shape) if sharding is not None else None,
            )
            for leaf, spec in named_leaves(param_specs(cfg))
        }
        total = sum(reader.values for reader in readers.values())
        with _bar(f"loading {folder.name}", total if progress else None) as report:
            leaves = {leaf: reader.load(report) for leaf, reader in readers.items()}
    return tree_of(leaves), cfg


@dataclasses.dataclass(frozen=True)
class _LeafReader:
    """Reads a leaf, box by box, from the tensors that cover it."""

    shards: Shards
    slots: list[Slot]
    shape: tuple[int, ...]
    dtype: np.dtype
    order: np.ndarray | None
    sharding: jax.sharding.Sharding | None

    @property
    def values(self) -> int:
        """How many values `load` reads: replicas on devices of one process count once."""
        if self.sharding is None:
            return math.prod(self.shape)
        parts = self.sharding.addressable_devices_indices_map(self.shape).values()
        boxes = {_bounds(self._box(part)) for part in parts if part is not None}
        return sum(math.prod(stop - start for start, stop in box) for box in boxes)

    def load(self, report: Callable[[int], None]) -> jax.Array:
        """The leaf on its devices. The host's copy is gone when this returns."""
        if self.sharding is None:
            everything = self._box((slice(None),) * len(self.shape))
            return jax.block_until_ready(jax.device_put(self._read(everything, report)))
        parts: dict[tuple, np.ndarray] = {}  # replicas share one

        def part(index: Box | None) -> np.ndarray:
            assert index is not None
            box = self._box(index)
            if _bounds(box) not in parts:
                parts[_bounds(box)] = self._read(box, report)
            return parts[_bounds(box)]

        array = jax.make_array_from_callback(self.shape, self.sharding, part)
        return jax.block_until_ready(array)

    def _box(self, index: Box) -> Box:
        return tuple(slice(*i.indices(n)) for i, n in zip(index, self.shape, strict=True))

    def _read(self, box: Box, report: Callable[[int], None]) -> np.ndarray:
        out = _aligned(tuple(s.stop - s.start for s in box), self.dtype)
        for slot in self.slots:
            lead, rest = box[: len(slot.index)], box[len(slot.index) :]
            if all(s.start <= i < s.stop for i, s in zip(slot.index, lead, strict=True)):
                at = tuple(i - s.start for i, s in zip(slot.index, lead, strict=True))
                part = out[(*at, ...)]
                self._read_slot(slot, rest, part)
                report(part.size)
        return out

    def _read_slot(self, slot: Slot, part: Box, out: np.ndarray) -> None:
        # A tensor with merged axes (fused experts) has our first axis, and the same bytes a row.
        shape = self.shape[len(slot.index) :]
        rows, columns = part[0], part[1:]
        picked = None if self.order is None else self.order[rows]
        if picked is None:
            start, stop = rows.start, rows.stop
        else:  # the stored rows we need are close to one another: reordering stays within a head
            start, stop = int(picked.min()), int(picked.max()) + 1
        stored = numpy_dtype(self.shards.entry(slot.name).dtype)
        all_columns = all(s.stop - s.start == n for s, n in zip(columns, shape[1:], strict=True))
        if picked is None and all_columns and stored == self.dtype:
            self.shards.read(slot.name, start, stop, out)
            return
        values = np.empty((stop - start, *shape[1:]), stored)
        self.shards.read(slot.name, start, stop, values)
        if picked is not None:
            values = values[picked - start]
        out[...] = values[(slice(None), *columns)]


def _bounds(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((s.start, s.stop) for s in box)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@contextlib.contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    if total is None:
        yield lambda count: None
        return
    with Progress() as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
