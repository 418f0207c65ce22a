"""The weights of a model on their way to a file, whatever they come from, one matrix at a time.

A `WeightSource` knows of every leaf what its weights are, before it reads one, and reads the part
of a leaf that fills one slot (`names.Slot`) on demand. `save` and `orbax_params` write what a
source hands out; params in memory (`save`), Hugging Face folders (`convert`) and Orbax folders
(`orbax_params`) are sources.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from dskjax.checkpoint import names
from dskjax.checkpoint.names import Slot
from dskjax.config import ModelConfig
from pallas_kernels.quant import Format

EMBEDDING = "embed_tokens.weight"
"""The leaf whose dtype is that of the params."""

Kind = tuple[Format, tuple[int, int]] | None
"""Format and block of a QTensor; None for floats."""

VALUES = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "int4": np.dtype(np.uint8)}
"""Dtype of a QTensor's values, by its format."""


class Codes(NamedTuple):
    """A quantized weight on the host, as a QTensor holds it; its leaf knows format and block.

    Attributes:
        values: float8_e4m3fn [N, K] or uint8 [N, K / 2].
        scales: float32, one per block.
    """

    values: np.ndarray
    scales: np.ndarray


HostWeight = np.ndarray | Codes
"""A weight on the host: floats [N, K] or [N], or quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafInfo:
    """What the weights of one leaf are.

    Attributes:
        shape: logical shape of the whole leaf, the stacked layers included.
        kind: format and block when quantized.
        dtype: of floats; of the values when quantized.
        scale_dtype: in which files keep scales; float32 in memory all the same.
        declared_dtype: in which pack-quantized files repeat the shape.
    """

    shape: tuple[int, ...]
    kind: Kind
    dtype: np.dtype
    scale_dtype: np.dtype = np.dtype(np.float32)
    declared_dtype: np.dtype = np.dtype(np.int64)


def is_int4(info: LeafInfo) -> bool:
    """Whether a leaf has int4 codes."""
    return info.kind is not None and info.kind[0] == "int4"


@runtime_checkable
class WeightSource(Protocol):
    """Weights that are read one at a time.

    Attributes:
        cfg: the model.
        leaves: what each leaf of `model.param_specs(cfg)` is.
        file_order: rotary rows come as files store them, not as params hold them.
    """

    @property
    def cfg(self) -> ModelConfig: ...  # noqa: D102

    @property
    def leaves(self) -> Mapping[str, LeafInfo]: ...  # noqa: D102

    @property
    def file_order(self) -> bool: ...  # noqa: D102

    def read(self, slot: Slot) -> HostWeight:
        """The weight of a slot, of the shape and kind that its leaf promises."""
        ...


def read_as(source: WeightSource, slot: Slot, *, file_order: bool) -> HostWeight:
    """Reads a weight with its rotary rows as files store them, or as params hold them.

    `check_rows` has to pass first.
    """
    weight, order = source.read(slot), names.row_order(slot.leaf, source.cfg)
    if order is None or file_order == source.file_order:
        return weight
    if file_order:
        order = np.argsort(order)
    if not isinstance(weight, Codes):
        return weight[order]
    kind = source.leaves[slot.leaf].kind
    assert kind is not None
    # Rows that share a scale stay together, and those with one of their own take it along.
    return Codes(weight.values[order], weight.scales[order] if kind[1][0] == 1 else weight.scales)


def check_rows(source: WeightSource, *, file_order: bool) -> None:
    """Checks that rotary rows can be put in the order of files, or of params.

    Raises:
        NotImplementedError: rows that share a scale would part; names the weight.
    """
    for name, leaf in source.leaves.items():
        order = names.row_order(name, source.cfg)
        if order is None or leaf.kind is None or file_order == source.file_order:
            continue
        rows = leaf.kind[1][0]
        if rows > 1 and (order // rows != np.arange(len(order)) // rows).any():
            raise NotImplementedError(
                f"weight {name!r}: files store rotary rows in another order, but those of a head "
                f"lie in more than one block of {rows} rows that share a scale: dequantise it"
            )


def floats(weight: HostWeight) -> np.ndarray:
    """A weight whose leaf has no kind."""
    assert not isinstance(weight, Codes), weight.values.dtype
    return weight
