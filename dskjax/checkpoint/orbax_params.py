"""Folders of params in Orbax checkpoints, one a layer (`parts`): written and read layer by layer.

For programs that know Orbax, for meshes whose processes each read their own parts, and for params
in forms that no Hugging Face folder has. Quantized weights stay quantized. Arrays are stored
uncompressed and in chunks, so that a process reads little more than its own part of one.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dskjax.axes import Sharding
from dskjax.checkpoint import names, stream
from dskjax.checkpoint.folder import replacing, write_text
from dskjax.checkpoint.from_params import ParamsSource
from dskjax.checkpoint.hf import check_options, load_config
from dskjax.checkpoint.layered import LayeredParams
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.orbax_index import INDEX, Index
from dskjax.checkpoint.part_files import PartReader, write_part
from dskjax.checkpoint.parts import Part, parts_of, place_of, template
from dskjax.checkpoint.resume import fingerprint
from dskjax.checkpoint.save import Report, config_text, dtype_field
from dskjax.checkpoint.weights import (
    EMBEDDING,
    Codes,
    LeafInfo,
    WeightSource,
    check_rows,
    read_as,
)
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, named_leaves
from pallas_kernels.quant import QTensor


def save_params(
    path: str | Path,
    params: Params,
    cfg: ModelConfig,
    *,
    extra_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder of Orbax checkpoints; `load_params` reads back the same bits.

    The folder appears complete or not at all, see `save_hf`. One layer is on the host at a time.

    Args:
        path: the folder to make.
        params: params of `cfg`, stacked or from `dskjax.params.unstack`, on any devices of this
            process; weights keep their dtype, QTensors of any format and block their bits.
        cfg: the model.
        extra_config: more fields for `config.json`; they may not change the model.
        overwrite: replace the config and the weights of a checkpoint folder that is there; its
            other files are carried over.

    Raises:
        ValueError: params do not fit `cfg`, or `extra_config` changes the model.
        FileExistsError: something is there already, and `overwrite` is false or it is no
            checkpoint.
        NotImplementedError: params spread over several processes.
    """
    source = ParamsSource(params, cfg)
    text = config_text(cfg.to_hf(), cfg, dtype_field(source.leaves), extra_config or {})
    with replacing(path, overwrite=overwrite) as folder:
        pieces = {}
        for part in orbax_files(source):
            part.write(folder)
            pieces[part.name] = fingerprint(folder / part.name)
        write_text(folder / "config.json", text)
        write_text(folder / INDEX, Index(leaves=source.leaves, parts=pieces).text())


@dataclasses.dataclass(frozen=True)
class OrbaxFile:
    """One part that is not written yet."""

    part: Part
    source: WeightSource
    slots: tuple[Slot, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.part.name

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = jax.tree.leaves([template(*described) for described in self._described().values()])
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

    def write(self, folder: Path, report: Report = lambda nbytes: None) -> None:
        """Reads the weights of the part and writes it, which may not exist yet.

        Args:
            folder: where.
            report: called with numbers of bytes as they are read.
        """
        arrays = {name: self._array(*described) for name, described in self._described().items()}
        for slot in self.slots:
            place, weight = place_of(slot), read_as(self.source, slot, file_order=False)
            target = arrays[place.name]
            if isinstance(weight, Codes):
                target.values[place.index], target.scales[place.index] = weight
                report(weight.values.nbytes + weight.scales.nbytes)
            else:
                target[place.index] = weight
                report(weight.nbytes)
        write_part(folder / self.name, arrays)

    def _described(self) -> dict[str, tuple[tuple[int, ...], LeafInfo]]:
        return {
            name: (spec.shape, self.source.leaves[self.part.leaf(name)])
            for name, spec in self.part.specs.items()
        }

    def _array(self, shape: tuple[int, ...], info: LeafInfo) -> Any:
        wanted = template(shape, info)
        if isinstance(wanted, QTensor):
            values, scales = wanted.values, wanted.scales
            return Codes(np.empty(values.shape, values.dtype), np.empty(scales.shape, scales.dtype))
        return np.empty(wanted.shape, wanted.dtype)


def orbax_files(source: WeightSource) -> list[OrbaxFile]:
    """The parts of a source's weights, not written yet.

    Raises:
        NotImplementedError: rotary rows cannot be put in our order; names the weight.
    """
    check_rows(source, file_order=False)
    slots: dict[tuple[str, int | None], list[Slot]] = {}
    for slot in names.slots(source.cfg):
        place = place_of(slot)
        slots.setdefault((place.group, place.layer), []).append(slot)
    return [
        OrbaxFile(part, source, tuple(slots[part.group, part.layer]))
        for part in parts_of(source.cfg)
    ]


def load_params(
    path: str | Path,
    *,
    dtype: Any | None = None,
    quantised: str = "keep",
    sharding: Sharding | None = None,
    layers: str = "stacked",
    progress: bool = False,
) -> tuple[Params, ModelConfig]:
    """Loads a folder that `save_params` or `dskjax convert` wrote.

    Arguments and results are those of `load_hf`, with one difference: a dtype of None leaves every
    weight in the dtype it was saved in. Memory beside the result: one layer, on the devices.

    Raises:
        CheckpointError: the folder is incomplete or damaged; names the part. The hashes of the
            index are not compared: they are for copies (`dskjax convert` does).
        ValueError: another `dtype`, `quantised` or `layers`.
    """
    folder = Path(path)
    check_options(dtype, quantised, layers)
    cfg = load_config(folder)
    index = Index.read(folder, cfg)
    total = sum(piece.nbytes for piece in index.parts.values())
    specs, embedding = dict(named_leaves(param_specs(cfg))), index.leaves[EMBEDDING].dtype
    out = LayeredParams(specs, separate=layers == "separate", sharding=sharding)
    with (
        PartReader(folder, index.leaves) as reader,
        stream.bar(f"loading {folder.name}", total if progress else None) as report,
    ):
        for part in parts_of(cfg):
            shapes = reader.shapes(part)
            places = {
                name: out.place(part.leaf(name), part.specs[name], shape)
                for name, shape in shapes.items()
            }
            weights = reader.read(part, places)
            for name, spec in part.specs.items():
                is_codes = isinstance(weights[name], QTensor)
                wanted = spec.dtype or dtype or (embedding if is_codes else None)
                if wanted is not None and not (is_codes and quantised == "keep"):
                    weights[name] = out.floats(part.leaf(name), spec, weights[name], wanted)
            out.add(part, weights)
            report(index.parts[part.name].nbytes)
    return out.params(), cfg
