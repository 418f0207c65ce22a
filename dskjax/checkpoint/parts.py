"""What an Orbax folder of params holds: its parts, and the index that describes them.

    config.json            the model, as in a Hugging Face folder
    dskjax-params.json     the index: what each leaf is, size and hash of each part
    top/                   an Orbax checkpoint: embedding, final norm, head
    layer-00000/ ...       one for each layer; MTP modules follow the trunk's layers

Every part is a plain Orbax checkpoint of a nested dict of arrays, named as in params; a QTensor is
a dict of its values and scales. `orbax.checkpoint.StandardCheckpointer().restore(part)` reads one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.weights import LeafInfo
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import WeightSpec, named_leaves
from pallas_kernels.quant import QTensor

TOP = "top"
GROUPS = ("dense_layers", "moe_layers", "mtp_layers")
"""Leaves stacked over layers, in the order of their layers."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer, or all that is outside the layers.

    Attributes:
        name: of its folder.
        layer: index into the stacked leaves; None outside the layers.
        group: name of those leaves' group; empty outside the layers.
        specs: its weights, by their name inside the part; their leaf's is `group.name`.
    """

    name: str
    layer: int | None
    group: str
    specs: Mapping[str, WeightSpec]

    def leaf(self, name: str) -> str:
        """The leaf that a weight of this part belongs to."""
        return f"{self.group}.{name}" if self.group else name


def parts_of(cfg: ModelConfig) -> list[Part]:
    """The parts of a model, in the order of its layers."""
    specs, layers = param_specs(cfg), []
    for group in GROUPS:
        stacked = dict(named_leaves(specs.pop(group, {})))
        count = next(iter(stacked.values())).shape[0] if stacked else 0
        own = {name: _unstacked(spec) for name, spec in stacked.items()}
        for layer in range(count):
            layers.append(Part(f"layer-{len(layers):05d}", layer, group, own))
    return [Part(TOP, None, "", dict(named_leaves(specs))), *layers]


class Place(NamedTuple):
    """Where a slot lies: which part (group, layer), which weight there, which part of that."""

    group: str
    layer: int | None
    name: str
    index: tuple[int, ...]


def place_of(slot: Slot) -> Place:
    """Where in a folder the weight of a slot lies."""
    group, _, name = slot.leaf.partition(".")
    if group not in GROUPS:
        return Place("", None, slot.leaf, slot.index)
    return Place(group, slot.index[0], name, slot.index[1:])


def _unstacked(spec: WeightSpec) -> WeightSpec:
    return dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])


def template(shape: tuple[int, ...], info: LeafInfo) -> Any:
    """Shapes and dtypes of a weight: a `jax.ShapeDtypeStruct`, or a QTensor of two."""
    if info.kind is None:
        return jax.ShapeDtypeStruct(shape, info.dtype)
    code, (rows, columns) = info.kind
    *lead, n, k = shape
    values: Any = jax.ShapeDtypeStruct((*lead, n, k // 2 if code == "int4" else k), info.dtype)
    scales: Any = jax.ShapeDtypeStruct((*lead, -(-n // rows), -(-k // columns)), np.float32)
    return QTensor(values, scales, (rows, columns), code)
