"""The index of an Orbax folder of params: what each leaf is, and the bytes of each part.

    {"format": "dskjax-params", "version": 1, "dtype": "bfloat16",
     "leaves": {"norm.weight": {"dtype": "bfloat16"},
                "moe_layers.mlp.experts.down_proj": {"format": "int4", "block": [1, 128], ..}, ..},
     "copies": ["model.layers.61.embed_tokens.weight", ..],
     "parts": {"layer-00000": {"nbytes": 1169184768, "sha256": "9f86.."}, ..}}

Shapes follow from `config.json`. It is written last, so a folder that has one is complete.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dskjax.checkpoint import names
from dskjax.checkpoint.parts import parts_of
from dskjax.checkpoint.resume import Piece
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.shards import read_json
from dskjax.checkpoint.stored import FLOATS
from dskjax.checkpoint.weights import EMBEDDING, VALUES, LeafInfo
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import WeightSpec, named_leaves

INDEX = "dskjax-params.json"
ACTIVATIONS = "activations.safetensors"
"""Scales of activations that a W4AFP8 folder had; params have no place for them."""

_FORMAT, _VERSION = "dskjax-params", 1
_FLOATS = {np.dtype(kind).name: np.dtype(kind) for kind in FLOATS.values()}
_SCALES = _FLOATS | {"float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu)}
_DECLARED = {"int64": np.dtype(np.int64), "int32": np.dtype(np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What `dskjax-params.json` says.

    Attributes:
        leaves: what each leaf is.
        parts: what is known of the bytes of each part, by name, and of `ACTIVATIONS` if there.
        copies: tensors that the Hugging Face folder it was made from held twice, by name.
    """

    leaves: Mapping[str, LeafInfo]
    parts: Mapping[str, Piece]
    copies: tuple[str, ...] = ()

    def text(self) -> str:
        """The file's text."""
        content: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
        content["dtype"] = self.leaves[EMBEDDING].dtype.name
        content["leaves"] = {name: _leaf_to_json(info) for name, info in self.leaves.items()}
        content["copies"] = list(self.copies)
        content["parts"] = {n: dataclasses.asdict(piece) for n, piece in sorted(self.parts.items())}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path, cfg: ModelConfig) -> "Index":
        """Reads the index of a folder, and checks that every part is there and of its size.

        Raises:
            CheckpointError: the index is missing, damaged, of another version or another model;
                or a part is incomplete.
        """
        file = folder / INDEX
        content = read_json(file)
        found = content.get("format"), content.get("version")
        if found != (_FORMAT, _VERSION):
            raise CheckpointError(
                f"{file}: format and version are {found}; expected {(_FORMAT, _VERSION)}: another "
                "program made it, or a later dskjax"
            )
        specs = dict(named_leaves(param_specs(cfg)))
        leaves, parts = (
            _object(content.get(name), f"{file}: {name}") for name in ("leaves", "parts")
        )
        if wrong := sorted(set(specs) ^ set(leaves)):
            kind = "lacks" if wrong[0] in specs else "has an unknown"
            raise CheckpointError(
                f"{file}: {kind} leaf {wrong[0]!r}; expected those of the model in config.json"
            )
        needed = [part.name for part in parts_of(cfg)] + [ACTIVATIONS] * (ACTIVATIONS in parts)
        copies = content.get("copies")
        if not isinstance(copies, list) or not all(isinstance(name, str) for name in copies):
            raise CheckpointError(f"{file}: copies = {copies!r}; expected a list of tensor names")
        if unknown := sorted(set(copies) - set(names.aliases(cfg))):
            raise CheckpointError(f"{file}: tensor {unknown[0]!r} is no copy of another")
        index = cls(
            leaves={
                name: _leaf(leaves[name], spec, f"{file}: leaf {name!r}")
                for name, spec in specs.items()
            },
            parts={name: _piece(parts.get(name), f"{file}: part {name!r}") for name in needed},
            copies=tuple(copies),
        )
        for name, piece in index.parts.items():
            _check_size(folder / name, piece.nbytes)
        return index


def _check_size(part: Path, expected: int) -> None:
    if not part.exists():
        raise CheckpointError(f"{part}: this part is missing; copy it again, or the whole folder")
    files = [part] if part.is_file() else part.rglob("*")
    found = sum(path.stat().st_size for path in files if path.is_file())
    if found != expected:
        raise CheckpointError(
            f"{part}: this part holds {found} bytes; expected {expected}: it is incomplete or was "
            "changed, copy it again"
        )


def _leaf_to_json(info: LeafInfo) -> dict[str, Any]:
    if info.kind is None:
        return {"dtype": info.dtype.name}
    return {
        "format": info.kind[0],
        "block": list(info.kind[1]),
        "scale_dtype": info.scale_dtype.name,
        "declared_dtype": info.declared_dtype.name,
    }


def _leaf(fields: Any, spec: WeightSpec, where: str) -> LeafInfo:
    fields = _object(fields, where)
    if "format" not in fields:
        return LeafInfo(shape=spec.shape, kind=None, dtype=_one_of(fields, "dtype", _FLOATS, where))
    _one_of(fields, "format", VALUES, where)
    block = fields.get("block")
    if not isinstance(block, list) or [type(n) for n in block] != [int, int] or min(block) < 1:
        raise CheckpointError(f"{where}: block = {block!r}; expected two positive integers")
    odd = fields["format"] == "int4" and spec.shape[-1] % 2
    if len(spec.shape) < 2 or odd:
        raise CheckpointError(
            f"{where}: a weight of shape {list(spec.shape)} cannot be quantized so"
        )
    return LeafInfo(
        shape=spec.shape,
        kind=(fields["format"], (block[0], block[1])),
        dtype=VALUES[fields["format"]],
        scale_dtype=_one_of(fields, "scale_dtype", _SCALES, where),
        declared_dtype=_one_of(fields, "declared_dtype", _DECLARED, where),
    )


def _piece(fields: Any, where: str) -> Piece:
    fields = _object(fields, where)
    nbytes, sha256 = fields.get("nbytes"), fields.get("sha256")
    if type(nbytes) is not int or not isinstance(sha256, str):
        raise CheckpointError(f"{where}: expected nbytes and sha256, found {fields}")
    return Piece(nbytes, sha256)


def _one_of(fields: Mapping[str, Any], name: str, known: Mapping[str, Any], where: str) -> Any:
    value = fields.get(name)
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{where}: {name} = {value!r}; expected one of {', '.join(known)}")
    return known[value]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {value!r}")
    return value
