"""What a checkpoint says about its quantization, read from `config.json` or ModelOpt's file.

    config.json          {"quantization_config": {"quant_method": "fp8", ...}}
    hf_quant_config.json {"quantization": {"quant_algo": "W4A8_AWQ", ...}}, beside it

A `Scheme` says which forms of weights (`stored`) are to be expected. Which weights are quantized is
read off the tensors themselves, so lists of ignored modules are not consulted.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.shards import read_json

Form = Literal["plain", "fp8", "int8", "words", "row_pairs"]
"""How one weight lies on disk: floats; e4m3 with block scales (DeepSeek); int4 with group scales as
int8 (W4AFP8), as int32 words (compressed-tensors) or as pairs of rows (ModelOpt).
"""

MODELOPT_FILE = "hf_quant_config.json"
GROUPS = (32, 64, 128)
"""Supported numbers of inputs that share an int4 scale."""

_ELSEWHERE = "convert the checkpoint to FP8 (quant_method 'fp8'), compressed-tensors int4 or BF16"
_KNOWN = {
    "awq": "AutoAWQ packs int4 with zero points along the outputs",
    "gptq": "GPTQ packs int4 with zero points and an order of inputs",
    "bitsandbytes": "bitsandbytes has formats of its own",
    "fbgemm_fp8": "its FP8 scales are per output row",
    "mxfp4": "MXFP4 weights are 4-bit floats",
    "gguf": "GGUF is a file format of its own",
    "quark": "AMD Quark has formats of its own",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weights of a checkpoint may be quantized.

    Attributes:
        source: where it says so, to start an error message with.
        method: its name for it.
        forms: forms of quantized weights to expect; at least one weight has one of them.
        block: rows and columns that share a scale of FP8.
        group: columns that share a scale of int4.
    """

    source: str
    method: str
    forms: tuple[Form, ...]
    block: tuple[int, int] = (128, 128)
    group: int = 128


def of_folder(folder: Path) -> Scheme | None:
    """The scheme of a checkpoint folder; None when it claims to hold plain floats.

    Raises:
        CheckpointError: a description that is malformed or contradicts itself.
        NotImplementedError: a scheme that is recognised and not supported, or not known.
    """
    file = folder / "config.json"
    config = read_json(file).get("quantization_config")
    beside = folder / MODELOPT_FILE
    algorithm = None
    if beside.exists():
        algorithm = _Fields(str(beside), read_json(beside)).table("quantization")
    if config is None:
        return None if algorithm is None else _modelopt(algorithm)
    where = f"{file}: quantization_config"
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} = {config!r} must be an object")
    fields = _Fields(where, config)
    method = fields.of("quant_method")
    if method == "modelopt":
        return _modelopt(fields if algorithm is None else algorithm)
    if algorithm is not None and method == "fp8":
        # TensorRT-LLM's mixed-precision checkpoints keep the config.json they were made from.
        return dataclasses.replace(_modelopt(algorithm), block=_fp8(fields).block)
    if not isinstance(method, str):
        raise CheckpointError(f"{where}: quant_method = {method!r} must be a name such as 'fp8'")
    if method not in _READERS:
        reason = f": {_KNOWN[method]}" if method in _KNOWN else ""
        raise NotImplementedError(
            f"{where}: quant_method {method!r} is not supported{reason}. "
            f"Supported: {', '.join(_READERS)}, modelopt; {_ELSEWHERE}"
        )
    return _READERS[method](fields)


@dataclasses.dataclass(frozen=True)
class _Fields:
    where: str
    values: Mapping[str, Any]

    def of(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def table(self, name: str) -> "_Fields":
        value = self.of(name)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: field {name!r} = {value!r} must be an object")
        return _Fields(f"{self.where}.{name}", value)

    def expect(self, name: str, wanted: Any, *, default: Any, why: str) -> None:
        value = self.of(name, default)
        if value != wanted:
            raise NotImplementedError(
                f"{self.where}: {name} = {value!r} is not supported, expected {wanted!r}: {why}; "
                f"{_ELSEWHERE}"
            )

    def group(self, default: int | None = None) -> int:
        group = _size(self.of("group_size", default), f"{self.where}: group_size")
        if group not in GROUPS:
            raise NotImplementedError(
                f"{self.where}: group_size = {group} is not supported, expected one of "
                f"{', '.join(map(str, GROUPS))}; {_ELSEWHERE}"
            )
        return group


def _size(value: Any, what: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{what} = {value!r} must be a positive integer")
    return value


def _fp8(fields: _Fields) -> Scheme:
    fields.expect("fmt", "e4m3", default="e4m3", why="weights of another format are not read")
    fields.expect(
        "activation_scheme", "dynamic", default="dynamic", why="activations are scaled as they come"
    )
    if fields.of("weight_block_size") is None:
        raise NotImplementedError(
            f"{fields.where}: there is no weight_block_size, so FP8 scales would be per tensor; "
            f"expected one per block, as in DeepSeek's [128, 128]; {_ELSEWHERE}"
        )
    return Scheme(source=fields.where, method="fp8", forms=("fp8",), block=_block(fields))


def _block(fields: _Fields) -> tuple[int, int]:
    block = fields.of("weight_block_size", [128, 128])
    what = f"{fields.where}: weight_block_size"
    if not isinstance(block, list) or len(block) != 2:
        raise CheckpointError(f"{what} = {block!r} must be [rows, columns]")
    return _size(block[0], what), _size(block[1], what)


def _w4afp8(fields: _Fields) -> Scheme:
    return Scheme(
        source=fields.where,
        method="w4afp8",
        forms=("fp8", "int8"),
        block=_block(fields),
        group=fields.group(128),
    )


def _compressed_tensors(fields: _Fields) -> Scheme:
    transforms = fields.of("transform_config")
    if transforms:
        raise NotImplementedError(
            f"{fields.where}: transform_config = {transforms!r} is not supported: weights are "
            f"stored rotated; {_ELSEWHERE}"
        )
    groups = fields.table("config_groups")
    if not groups.values:
        raise CheckpointError(f"{groups.where} is empty; expected at least one group")
    sizes = {name: _int4_group(fields, groups.table(name)) for name in groups.values}
    if len(set(sizes.values())) > 1:
        raise NotImplementedError(
            f"{groups.where}: group sizes {sizes} differ; expected one for all; {_ELSEWHERE}"
        )
    return Scheme(
        source=fields.where,
        method="compressed-tensors",
        forms=("words",),
        group=next(iter(sizes.values())),
    )


def _int4_group(whole: _Fields, group: _Fields) -> int:
    named = group if group.of("format") is not None else whole
    named.expect(
        "format", "pack-quantized", default="dense", why="only int4 words are read of its formats"
    )
    weights = group.table("weights")
    weights.expect("num_bits", 4, default=8, why="integers of another width are not read")
    weights.expect("type", "int", default="int", why="4-bit floats are not read")
    weights.expect("symmetric", True, default=True, why="zero points are not read")
    weights.expect("strategy", "group", default="tensor", why="int4 has a scale per group")
    weights.expect("dynamic", False, default=False, why="weights have stored scales")
    return weights.group()


def _modelopt(fields: _Fields) -> Scheme:
    algorithm = fields.of("quant_algo")
    forms: dict[Any, tuple[Form, ...]] = {
        "W4A8_AWQ": ("row_pairs",),
        # of TensorRT-LLM: experts W4A8, all else FP8 with block scales
        "MIXED_PRECISION": ("fp8", "int8", "row_pairs"),
    }
    if not isinstance(algorithm, str) or algorithm not in forms:
        raise NotImplementedError(
            f"{fields.where}: quant_algo {algorithm!r} is not supported; "
            f"supported: {', '.join(forms)}; {_ELSEWHERE}"
        )
    fields.expect("has_zero_point", False, default=False, why="zero points are not read")
    return Scheme(
        source=fields.where, method=algorithm, forms=forms[algorithm], group=fields.group(128)
    )


_READERS = {"fp8": _fp8, "w4afp8": _w4afp8, "compressed-tensors": _compressed_tensors}
