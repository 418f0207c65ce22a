"""How one weight lies in a checkpoint: its form, the tensors that belong to it, what they must be.

    plain      X.weight                    float [N, K]
    fp8        X.weight                    e4m3 [N, K]
               X.weight_scale_inv          [ceil(N / 128), ceil(K / 128)], a multiplier all the same
    int8       X.weight                    int8 [N, K / 2], W4AFP8
               X.weight_scale_inv          [N, K / group]
    words      X.weight_packed             int32 [N, ceil(K / 8)], compressed-tensors
               X.weight_scale              [N, K / group]
               X.weight_shape              [2] = N, K
    row_pairs  X.weight                    uint8 [N / 2, K], ModelOpt
               X.weight_scale              [N, K / group]
               X.pre_quant_scale           [K], a factor of each input; W4A8_AWQ

Scales of activations (`input_scale`) are known and not used: activations are scaled as they come.
How the bytes become values is the business of `sources`.
"""

import dataclasses
from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np

from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.schemes import Form, Scheme
from dskjax.checkpoint.shards import Shards
from pallas_kernels.quant import Format

FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""Dtypes of weights that are loaded and saved, by their safetensors code."""

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
SCALE_NAMES = {
    "fp8": ".weight_scale_inv",
    "int8": ".weight_scale_inv",
    "words": ".weight_scale",
    "row_pairs": ".weight_scale",
}
_OF_DTYPE: dict[str, Form] = {"F8_E4M3": "fp8", "I8": "int8", "U8": "row_pairs"}
# W4AFP8 names the activations of an expert's projections after Mixtral's.
_W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One slot of a leaf, as a checkpoint holds it.

    Attributes:
        slot: the part of a leaf it fills; `slot.shape` is the weight's logical shape [N, K].
        form: how it lies on disk.
        values: name of the tensor with the values.
        scales: name of the tensor with the scales, unless plain.
        block: rows and columns that share a scale.
        columns: name of the tensor with a factor for each input column.
        declared: name of the tensor that repeats [N, K].
        unused: further tensors that belong to the weight.
    """

    slot: Slot
    form: Form
    values: str
    scales: str | None = None
    block: tuple[int, int] = (1, 1)
    columns: str | None = None
    declared: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[Format, tuple[int, int]] | None:
        """Format and block of the `QTensor` it is a part of; None for floats."""
        if self.form == "plain":
            return None
        return ("e4m3" if self.form == "fp8" else "int4"), self.block

    def names(self) -> Iterator[str]:
        """Every tensor that belongs to the weight."""
        yield self.values
        yield from self.unused
        for name in (self.scales, self.columns, self.declared):
            if name is not None:
                yield name

    def scales_shape(self) -> tuple[int, int]:
        """[rows, columns] of the scales: one for each block, cut off or not."""
        (n, k), (bn, bk) = self.slot.shape, self.block
        return -(-n // bn), -(-k // bk)


def locate(shards: Shards, slot: Slot, scheme: Scheme | None) -> Stored | None:
    """The weight of a slot among the tensors of a folder; None when it is not there.

    Raises:
        CheckpointError: it lies in a form that the scheme does not speak of.
        NotImplementedError: experts that are both fused and quantized.
    """
    base = slot.name.removesuffix(".weight")
    packed = f"{base}.weight_packed"
    if slot.name in shards:
        form = _OF_DTYPE.get(shards.entry(slot.name).dtype, "plain")
        values = slot.name
    elif base != slot.name and packed in shards:
        form, values = "words", packed
    else:
        return None
    if form == "plain":
        return Stored(slot=slot, form=form, values=values)
    _check_expected(shards, values, form, scheme)
    assert scheme is not None
    if len(slot.shape) != 2:
        raise NotImplementedError(
            f"{shards.file(values)}: tensor {values!r} is quantized, but it is not one matrix "
            f"(expected shape {list(slot.shape)}): fused experts and vectors are read as BF16, "
            "F16 or F32 only; convert the checkpoint to one tensor for each expert"
        )
    return _quantised(shards, slot, form, values, scheme)


def _quantised(shards: Shards, slot: Slot, form: Form, values: str, scheme: Scheme) -> Stored:
    base = slot.name.removesuffix(".weight")
    parent, _, own = base.rpartition(".")
    unused = {
        "int8": (f"{parent}.{_W123.get(own, own)}.input_scale",),
        "row_pairs": (f"{base}.weight_scale_2", f"{base}.input_scale"),
    }
    factors = f"{base}.pre_quant_scale"
    return Stored(
        slot=slot,
        form=form,
        values=values,
        scales=base + SCALE_NAMES[form],
        block=scheme.block if form == "fp8" else (1, scheme.group),
        columns=factors if form == "row_pairs" and factors in shards else None,
        declared=f"{base}.weight_shape" if form == "words" else None,
        unused=tuple(name for name in unused.get(form, ()) if name in shards),
    )


def check(shards: Shards, stored: Stored) -> None:
    """Settles dtypes and shapes of all tensors of a weight, before a value is read.

    Raises:
        CheckpointError: names the file, the tensor, what was expected and what was found.
    """
    name, shape = stored.values, stored.slot.shape
    for companion in stored.names():
        if companion not in shards:
            raise CheckpointError(
                f"{shards.file(name)}: tensor {name!r} has dtype {shards.entry(name).dtype}, but "
                f"its companion {companion!r} is missing from {shards.folder}"
            )
    if stored.form == "plain":
        check_dtype(shards, name, FLOATS)
        check_shape(shards, name, shape, " from config.json")
        return
    _check_values(shards, stored)
    assert stored.scales is not None
    check_dtype(shards, stored.scales, _SCALES)
    rows, columns = stored.block
    what = f", a scale for each {rows}x{columns} of {list(shape)}"
    check_shape(shards, stored.scales, stored.scales_shape(), what)
    if stored.columns is not None:
        check_dtype(shards, stored.columns, FLOATS)
        check_shape(shards, stored.columns, shape[1:], ", a factor for each input")
    if stored.declared is not None:
        check_dtype(shards, stored.declared, ("I64", "I32"))
        check_shape(shards, stored.declared, (2,), ", rows and columns of the weight")
    for other in stored.unused:
        check_dtype(shards, other, FLOATS)
        if shards.entry(other).shape not in ((), (1,)):
            check_shape(shards, other, (1,), ", one scale for the activations")


def _check_values(shards: Shards, stored: Stored) -> None:
    name, (n, k), group = stored.values, stored.slot.shape, stored.block[1]
    where = f"{shards.file(name)}: tensor {name!r}"
    if stored.form == "fp8":
        check_shape(shards, name, (n, k), " from config.json")
        return
    if k % 2 or k % group:
        raise CheckpointError(
            f"{where} is int4 with {k} input columns (config.json); expected an even number of "
            f"them that groups of {group} divide"
        )
    if stored.form == "row_pairs" and n % 2:
        raise CheckpointError(f"{where} packs pairs of rows, but config.json makes it {n} rows")
    packed = {"int8": (n, k // 2), "words": (n, -(-k // 8)), "row_pairs": (n // 2, k)}
    check_dtype(shards, name, ("I32",) if stored.form == "words" else ("I8", "U8"))
    check_shape(shards, name, packed[stored.form], f", int4 [{n}, {k}] packed")


def check_dtype(shards: Shards, name: str, allowed: Collection[str]) -> None:
    """Raises CheckpointError when a tensor has another dtype than the allowed ones."""
    dtype = shards.entry(name).dtype
    if dtype not in allowed:
        raise CheckpointError(
            f"{shards.file(name)}: tensor {name!r} has dtype {dtype}; expected {', '.join(allowed)}"
        )


def check_shape(shards: Shards, name: str, shape: tuple[int, ...], why: str) -> None:
    """Raises CheckpointError when a tensor has another shape than it must have."""
    found = shards.entry(name).shape
    if found != shape:
        raise CheckpointError(
            f"{shards.file(name)}: tensor {name!r} has shape {list(found)}; "
            f"expected {list(shape)}{why}"
        )


def _check_expected(shards: Shards, name: str, form: Form, scheme: Scheme | None) -> None:
    if scheme is not None and form in scheme.forms:
        return
    says = (
        "config.json has no quantization_config"
        if scheme is None
        else f"{scheme.source} says {scheme.method!r}"
    )
    raise CheckpointError(
        f"{shards.file(name)}: tensor {name!r} has dtype {shards.entry(name).dtype}, as quantized "
        f"weights have, but {says}; restore the config.json that belongs to these files"
    )
