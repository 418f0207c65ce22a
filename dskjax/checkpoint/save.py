"""Params to Hugging Face checkpoint folders: `config.json` and safetensors, bit for bit.

`hf` reads them back. The one change on the way: rotary rows are put into the order that the config
says they are stored in (`names.row_order`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dskjax.checkpoint import inventory, names
from dskjax.checkpoint.folder import replacing, write_text
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.safetensors import Pending, write
from dskjax.checkpoint.shards import INDEX, SINGLE
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, WeightSpec, named_leaves


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
