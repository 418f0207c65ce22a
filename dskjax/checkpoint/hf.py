"""Hugging Face checkpoint folders: `config.json` and safetensors, in and out, bit for bit.

Loading settles every name, shape and dtype (`inventory`) before it reads a value, so what comes
back is complete, or an error. Values go from the files straight into the stacked arrays, of which
each device gets its own part only. The one change on the way: rotary rows that are stored
interleaved are put in half-split order (`names.row_order`), and put back on saving.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from dskjax.axes import Sharding
from dskjax.checkpoint import inventory, names
from dskjax.checkpoint.folder import replacing, write_text
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.safetensors import CheckpointError, Pending, numpy_dtype, write
from dskjax.checkpoint.shards import INDEX, SINGLE, Shards, check_folder, read_json
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, WeightSpec, named_leaves, tree_of

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


def save_hf(
    path: str | Path,
    params: Params,
    cfg: ModelConfig,
    *,
    max_shard_bytes: int = 5_000_000_000,
    extra_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    alias_copies: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder in the hub's layout; `load_hf` reads back the same bits.

    The folder appears complete or not at all: it is written beside its place and renamed. MTP
    modules are written without the copies of embedding and head that DeepSeek's files hold, since
    `load_hf` takes the trunk's anyway; `alias_copies` writes them for programs that need them.

    Args:
        path: the folder to make.
        params: params of `cfg`, on any devices of this process; weights keep their dtype.
        cfg: the model. `rope_interleave` in it is how rotary rows are stored.
        max_shard_bytes: start another file before one gets larger than this. A tensor is never
            split.
        extra_config: more fields for `config.json`; they may not change the model.
        metadata: strings for the header of each file.
        alias_copies: write the MTP modules' copies of the trunk's embedding and head too.
        overwrite: replace the config and the weights of a checkpoint folder that is there; its
            other files are carried over. Between two renames there is no folder at `path`.

    Raises:
        ValueError: params do not fit `cfg`, or `extra_config` changes the model.
        FileExistsError: something is there already, and `overwrite` is false or it is no
            checkpoint.
        NotImplementedError: quantized params, or params spread over several processes.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be positive")
    source = _LeafSource(params, cfg)
    slots = sorted(names.slots(cfg), key=lambda slot: names.layer_of(slot.name))
    wanted = {slot.name: slot for slot in slots}
    if alias_copies:
        wanted |= names.aliases(cfg)
    tensors = [source.tensor(name, slot) for name, slot in wanted.items()]
    files = list(_split(tensors, max_shard_bytes))
    config = _config_json(cfg, source.leaves["embed_tokens.weight"].dtype, extra_config or {})
    header = {"format": "pt", **(metadata or {})}  # transformers refuses files without "format"
    with replacing(path, overwrite=overwrite) as folder:
        if len(files) == 1:
            write(folder / SINGLE, files[0], header)
        else:
            weight_map = {}
            for number, file in enumerate(files, 1):
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
                write(folder / name, file, header)
                weight_map |= {tensor.name: name for tensor in file}
            size = sum(tensor.nbytes for tensor in tensors)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
        write_text(folder / "config.json", config)


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


class _LeafSource:
    """Hands out the tensors of params; one layer of one leaf is on the host at a time."""

    def __init__(self, params: Params, cfg: ModelConfig):
        self.cfg = cfg
        self.leaves = dict(named_leaves(params))
        specs = dict(named_leaves(param_specs(cfg)))
        if wrong := sorted(set(specs) ^ set(self.leaves)):
            kind = "lack" if wrong[0] in specs else "have an unknown"
            raise ValueError(
                f"params {kind} weight {wrong[0]!r}; is this the config of these params?"
            )
        for leaf, spec in specs.items():
            _check_leaf(leaf, self.leaves[leaf], spec)
        self._kept: tuple[tuple[str, int | None] | None, np.ndarray] = (None, np.empty(0))

    def tensor(self, name: str, slot: Slot) -> Pending:
        """The tensor `name`, not made yet."""
        dtype = np.dtype(self.leaves[slot.leaf].dtype)
        return Pending(name, dtype, slot.shape, lambda: self._make(slot))

    def _make(self, slot: Slot) -> np.ndarray:
        layer, inner = (slot.index[0], slot.index[1:]) if slot.index else (None, ())
        key = (slot.leaf, layer)
        if self._kept[0] != key:
            self._kept = (key, _to_host(self.leaves[slot.leaf], layer))
        values = self._kept[1][inner]
        order = names.row_order(slot.leaf, self.cfg)
        return values if order is None else values[np.argsort(order)]


def _check_leaf(leaf: str, value: Any, spec: WeightSpec) -> None:
    if not isinstance(value, jax.Array | np.ndarray):
        raise NotImplementedError(
            f"weight {leaf!r} is a {type(value).__name__}; only arrays are saved: dequantise it"
        )
    if value.shape != spec.shape:
        raise ValueError(f"weight {leaf!r} has shape {value.shape}; expected {spec.shape}")
    if np.dtype(value.dtype) not in map(np.dtype, inventory.FLOATS.values()):
        raise ValueError(f"weight {leaf!r} has dtype {value.dtype}; cast it to bfloat16 or float32")
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise NotImplementedError(
            f"weight {leaf!r} is spread over several processes; gather it first"
        )


@jax.jit
def _take_layer(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _to_host(leaf: Any, layer: int | None) -> np.ndarray:
    if isinstance(leaf, jax.Array) and layer is not None:
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        if len(leaf.devices()) > 1 or not on_host:  # or the whole leaf would be copied, and kept
            return np.asarray(_take_layer(leaf, np.int32(layer)))
    whole = np.asarray(leaf)
    return whole if layer is None else whole[layer]


def _split(tensors: Sequence[Pending], limit: int) -> Iterator[list[Pending]]:
    file, size = [], 0
    for tensor in tensors:
        if file and size + tensor.nbytes > limit:
            yield file
            file, size = [], 0
        file.append(tensor)
        size += tensor.nbytes
    yield file


def _config_json(cfg: ModelConfig, dtype: Any, extra: Mapping[str, Any]) -> str:
    config = {**cfg.to_hf(), "torch_dtype": np.dtype(dtype).name, **extra}
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    if ModelConfig.from_hf(json.loads(text)) != cfg:
        raise ValueError(f"extra_config={dict(extra)} changes the model; change `cfg` instead")
    return text


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
