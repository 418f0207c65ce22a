"""Params in memory as a source of weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.stored import FLOATS
from dskjax.checkpoint.weights import VALUES, Codes, HostWeight, LeafInfo
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, WeightSpec, is_weight, named_leaves
from pallas_kernels.quant import QTensor


class ParamsSource:
    """Hands out the weights of params; one layer of one leaf is on the host at a time.

    Args:
        params: params of `cfg`, stacked or with separate layers.
        cfg: the model.

    Attributes:
        cfg: the model.
        leaves: what each leaf is.
        file_order: see `weights.WeightSource`.

    Raises:
        ValueError: params do not fit `cfg`, hold redundant experts, or have a dtype that files do
            not hold.
        NotImplementedError: params are spread over several processes.
    """

    file_order = False

    def __init__(self, params: Params, cfg: ModelConfig):
        if cfg.moe is not None and cfg.moe.num_redundant_experts:
            raise ValueError(
                f"these params hold {cfg.moe.num_redundant_experts} redundant experts a layer, and "
                "a checkpoint has each expert once: take what "
                "dskjax.expert_parallel.place.unplace returns"
            )
        self.cfg = cfg
        self._stacks = dict(_stacks(params))
        specs = dict(named_leaves(param_specs(cfg)))
        if wrong := sorted(set(specs) ^ set(self._stacks)):
            kind = "lack" if wrong[0] in specs else "have an unknown"
            raise ValueError(
                f"params {kind} weight {wrong[0]!r}; is this the config of these params?"
            )
        leaves = {name: _describe(name, self._stacks[name], spec) for name, spec in specs.items()}
        if not any(leaf.kind is not None and leaf.kind[0] == "e4m3" for leaf in leaves.values()):
            # Without FP8 beside it int4 is pack-quantized, whose scales are usually bfloat16.
            leaves |= {
                name: dataclasses.replace(leaf, scale_dtype=np.dtype(ml_dtypes.bfloat16))
                for name, leaf in leaves.items()
                if leaf.kind is not None and self._stacks[name].has_bfloat16_scales()
            }
        self.leaves: Mapping[str, LeafInfo] = leaves
        self._kept: tuple[tuple[str, int | None] | None, HostWeight] = (None, np.empty(0))

    def read(self, slot: Slot) -> HostWeight:
        """See `weights.WeightSource`."""
        layer, inner = (slot.index[0], slot.index[1:]) if slot.index else (None, ())
        key = (slot.leaf, layer)
        if self._kept[0] != key:
            self._kept = (key, self._stacks[slot.leaf].to_host(layer))
        layer_of_leaf = self._kept[1]
        if isinstance(layer_of_leaf, Codes):
            return Codes(*(array[inner] for array in layer_of_leaf))
        return layer_of_leaf[inner]


@dataclasses.dataclass(frozen=True)
class _Stack:
    """A leaf: one array or QTensor for all layers, or one for each."""

    parts: tuple[Any, ...]
    separate: bool

    def to_host(self, layer: int | None) -> HostWeight:
        part = self.parts[layer if self.separate and layer is not None else 0]
        take = lambda array: _to_host(array, None if self.separate else layer)  # noqa: E731
        return Codes(take(part.values), take(part.scales)) if is_weight(part) else take(part)

    def has_bfloat16_scales(self) -> bool:
        return all(bool(_fits_bfloat16(part.scales)) for part in self.parts)


def _stacks(params: Params) -> Iterator[tuple[str, _Stack]]:
    for group, tree in params.items():
        if isinstance(tree, tuple):
            layers = [dict(named_leaves(layer)) for layer in tree]
            for name in sorted(set().union(*layers)):
                yield f"{group}.{name}", _Stack(tuple(layer.get(name) for layer in layers), True)
        else:
            for name, leaf in named_leaves({group: tree}):
                yield name, _Stack((leaf,), False)


def _describe(name: str, stack: _Stack, spec: WeightSpec) -> LeafInfo:
    layers = spec.shape[0] if stack.separate else 1
    if len(stack.parts) != layers:
        raise ValueError(f"weight {name!r} has {len(stack.parts)} layers; expected {layers}")
    shape = spec.shape[1:] if stack.separate else spec.shape
    found = [_describe_part(name, part, shape, spec) for part in stack.parts]
    for leaf in found:
        if leaf != found[0]:
            raise ValueError(
                f"weight {name!r} is {_name(found[0])} in one layer and {_name(leaf)} in another; "
                "a checkpoint of this kind has one form for all: dequantise or cast it"
            )
    return found[0]


def _name(leaf: LeafInfo) -> str:
    return leaf.dtype.name if leaf.kind is None else f"{leaf.kind[0]} in blocks of {leaf.kind[1]}"


def _describe_part(name: str, value: Any, shape: tuple[int, ...], spec: WeightSpec) -> LeafInfo:
    for array in (value.values, value.scales) if isinstance(value, QTensor) else (value,):
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"weight {name!r} is a {type(array).__name__}; expected an array")
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise NotImplementedError(
                f"weight {name!r} is spread over several processes; gather it first"
            )
    if value.shape != shape:
        raise ValueError(f"weight {name!r} has shape {value.shape}; expected {shape}")
    if not isinstance(value, QTensor):
        dtype = np.dtype(value.dtype)
        if dtype not in map(np.dtype, FLOATS.values()):
            raise ValueError(f"weight {name!r} has dtype {dtype}; cast it to bfloat16 or float32")
        return LeafInfo(shape=spec.shape, kind=None, dtype=dtype)
    dtypes = np.dtype(value.values.dtype), np.dtype(value.scales.dtype)
    if dtypes != (VALUES[value.format], np.float32):
        raise ValueError(
            f"weight {name!r} is a QTensor of {dtypes[0]} with scales of {dtypes[1]}; "
            f"{value.format} has {VALUES[value.format]} and float32"
        )
    *lead, n, k = shape
    rows, columns = value.block
    scales = (*lead, -(-n // rows), -(-k // columns))
    if value.scales.shape != scales:
        raise ValueError(
            f"weight {name!r} has scales of shape {value.scales.shape}; expected {scales}, one per "
            f"{rows}x{columns}"
        )
    return LeafInfo(shape=spec.shape, kind=(value.format, value.block), dtype=dtypes[0])


@jax.jit
def _take_layer(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _to_host(leaf: Any, layer: int | None) -> np.ndarray:
    if layer is None:
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array):
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        if len(leaf.devices()) > 1 or not on_host:  # or the whole leaf would be copied, and kept
            return np.asarray(_take_layer(leaf, np.int32(layer)))
    return np.asarray(leaf)[layer]


@jax.jit
def _fits_bfloat16(scales: jax.Array) -> jax.Array:
    # By the bits: XLA may drop a cast to bfloat16 and back.
    return (jax.lax.bitcast_convert_type(scales, np.uint32) & 0xFFFF == 0).all()
