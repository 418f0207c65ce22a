"""Params to Hugging Face checkpoint folders: `config.json` and safetensors, bit for bit.

`hf` reads them back. The one change on the way: rotary rows are put into the order that the config
says they are stored in (`names.row_order`). Quantized weights are written in the public format that
holds them (`formats`).
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dskjax.checkpoint import formats, names
from dskjax.checkpoint.folder import replacing, write_text
from dskjax.checkpoint.from_params import ParamsSource
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.packing import int8_from_int4, words_from_int4
from dskjax.checkpoint.safetensors import Pending, write
from dskjax.checkpoint.schemes import Form
from dskjax.checkpoint.shards import INDEX, SINGLE
from dskjax.checkpoint.stored import SCALE_NAMES
from dskjax.checkpoint.weights import (
    EMBEDDING,
    Codes,
    HostWeight,
    LeafInfo,
    WeightSource,
    check_rows,
    floats,
    read_as,
)
from dskjax.config import ModelConfig
from dskjax.params import Params

MAX_SHARD_BYTES = 5_000_000_000

Report = Callable[[int], object]

Group = tuple[Pending, ...]
"""Tensors that are made from one weight; they go to the same file, one after the other."""


def save_hf(
    path: str | Path,
    params: Params,
    cfg: ModelConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    alias_copies: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder in the hub's layout; `load_hf` reads back the same bits.

    The folder appears complete or not at all: it is written beside its place and renamed. MTP
    modules are written without the copies of embedding and head that DeepSeek's files hold, since
    `load_hf` takes the trunk's anyway; `alias_copies` writes them for programs that need them.

    Quantized weights are written as DeepSeek's FP8, as W4AFP8 (int4 experts, the rest FP8) or as
    pack-quantized int4 of compressed-tensors; `quantization_config` goes to `config.json`. Scales
    of the last are bfloat16 if that loses nothing, as is usual, and float32 otherwise.

    Args:
        path: the folder to make.
        params: params of `cfg`, stacked or from `dskjax.params.unstack`, on any devices of this
            process; weights keep their dtype.
        cfg: the model. `rope_interleave` in it is how rotary rows are stored.
        max_shard_bytes: start another file before one gets larger than this. A weight is never
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
        NotImplementedError: quantized params that no public format holds, or params spread over
            several processes.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be positive")
    source = ParamsSource(params, cfg)
    copies = names.aliases(cfg) if alias_copies else {}
    plan = HubPlan.of(source, copies, max_shard_bytes=max_shard_bytes, metadata=metadata)
    text = config_text(cfg.to_hf(), cfg, plan.config_fields, extra_config or {})
    with replacing(path, overwrite=overwrite) as folder:
        for file in plan.files:
            file.write(folder)
        for name, content in (plan.texts | {"config.json": text}).items():
            write_text(folder / name, content)


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of weights that is not written yet."""

    name: str
    groups: tuple[Group, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for group in self.groups for tensor in group)

    def write(self, folder: Path, report: Report = lambda nbytes: None) -> None:
        """Reads the weights and writes the file, which may not exist yet.

        Args:
            folder: where.
            report: called with numbers of bytes as they are read.
        """
        tensors = [tensor for group in self.groups for tensor in group]
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as reader:
            ahead = _Ahead(tensors, reader, report)
            pending = [dataclasses.replace(tensor, make=ahead.take) for tensor in tensors]
            write(folder / self.name, pending, dict(self.metadata))


class _Ahead:
    """Makes the values of tensors in their order, each while the one before is being written."""

    def __init__(self, tensors: Sequence[Pending], reader: Executor, report: Report):
        self._todo, self._reader, self._report = iter(tensors), reader, report
        self._next = self._begin()

    def take(self) -> np.ndarray:
        """The value of the next tensor."""
        assert self._next is not None
        value = self._next.result()
        self._report(value.nbytes)
        self._next = self._begin()
        return value

    def _begin(self) -> Future[np.ndarray] | None:
        tensor = next(self._todo, None)
        return None if tensor is None else self._reader.submit(tensor.make)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubPlan:
    """What a Hugging Face folder will hold, settled before anything is read or written.

    Attributes:
        files: of weights.
        texts: other files by name: the index, when there are several files.
        config_fields: what the weights put into `config.json`.
    """

    files: list[HubFile]
    texts: dict[str, str]
    config_fields: dict[str, Any]

    @classmethod
    def of(
        cls,
        source: WeightSource,
        copies: Mapping[str, Slot],
        *,
        more: Iterable[Pending] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> "HubPlan":
        """Plans the files.

        Args:
            source: the weights.
            copies: further names for weights, as of `names.aliases`.
            more: tensors beside the weights.
            max_shard_bytes: see `save_hf`.
            metadata: strings for the header of each file.

        Raises:
            NotImplementedError: no public format holds these weights.
        """
        forms = formats.choose(source.leaves)
        check_rows(source, file_order=True)
        wanted = [(slot.name, slot) for slot in names.slots(source.cfg)] + [*copies.items()]
        groups = [_tensors(source, name, slot, forms[slot.leaf]) for name, slot in wanted]
        groups += [(tensor,) for tensor in more]
        groups.sort(key=lambda group: names.layer_of(group[0].name))
        parts = list(_split(groups, max_shard_bytes))
        # transformers refuses files without "format"
        header = {"format": "pt", **(metadata or {})}
        files = [
            HubFile(
                f"model-{number:05d}-of-{len(parts):05d}.safetensors" if parts[1:] else SINGLE,
                tuple(part),
                header,
            )
            for number, part in enumerate(parts, 1)
        ]
        fields = dtype_field(source.leaves)
        if (described := formats.describe(source.leaves, forms, source.cfg)) is not None:
            fields["quantization_config"] = described
        texts = {INDEX: _index(files)} if files[1:] else {}
        return cls(files=files, texts=texts, config_fields=fields)


def dtype_field(leaves: Mapping[str, LeafInfo]) -> dict[str, Any]:
    """What the dtype of the embedding puts into `config.json`."""
    return {"torch_dtype": leaves[EMBEDDING].dtype.name}


def config_text(
    base: Mapping[str, Any], cfg: ModelConfig, fields: Mapping[str, Any], extra: Mapping[str, Any]
) -> str:
    """The text of a `config.json`.

    Args:
        base: the fields that describe the model.
        cfg: the model.
        fields: those that describe its weights.
        extra: those of a caller.

    Raises:
        ValueError: `extra` changes the model, or says something else of the weights.
    """
    text = json.dumps({**base, **fields, **extra}, indent=2, allow_nan=False) + "\n"
    if ModelConfig.from_hf(json.loads(text)) != cfg:
        raise ValueError(f"extra_config={dict(extra)} changes the model; change `cfg` instead")
    name = "quantization_config"
    if name in extra and extra[name] != fields.get(name):
        raise ValueError(
            f"extra_config sets {name} to {extra[name]}, but these weights make it "
            f"{fields.get(name)}; leave it out"
        )
    return text


def _tensors(source: WeightSource, name: str, slot: Slot, form: Form) -> Group:
    leaf = source.leaves[slot.leaf]

    def read() -> HostWeight:
        return read_as(source, slot, file_order=True)

    if form == "plain":
        return (Pending(name, leaf.dtype, slot.shape, lambda: floats(read())),)
    return _quantised(name.removesuffix(".weight"), slot.shape, leaf, form, read)


def _quantised(
    base: str, shape: tuple[int, ...], leaf: LeafInfo, form: Form, read: Callable[[], HostWeight]
) -> Group:
    assert leaf.kind is not None
    (n, k), (rows, columns) = shape, leaf.kind[1]
    weight = _Once(read)

    def tensor(suffix: str, dtype: Any, shape: tuple[int, ...], make: Any) -> Pending:
        return Pending(base + suffix, np.dtype(dtype), shape, make)

    scales = tensor(
        SCALE_NAMES[form],
        leaf.scale_dtype,
        (-(-n // rows), -(-k // columns)),
        lambda: weight.scales().astype(leaf.scale_dtype),
    )
    if form == "fp8":
        return tensor(".weight", leaf.dtype, (n, k), weight.values), scales
    if form == "int8":
        values = lambda: int8_from_int4(weight.values())  # noqa: E731
        return tensor(".weight", np.int8, (n, k // 2), values), scales
    assert form == "words", form
    declared = tensor(
        ".weight_shape", leaf.declared_dtype, (2,), lambda: np.array((n, k), leaf.declared_dtype)
    )
    words = lambda: words_from_int4(weight.values())  # noqa: E731
    return tensor(".weight_packed", np.int32, (n, -(-k // 8)), words), scales, declared


class _Once:
    """A quantized weight: read for its values, and kept until its scales are taken, right after."""

    def __init__(self, read: Callable[[], HostWeight]):
        self._read = read
        self._scales: np.ndarray | None = None

    def values(self) -> np.ndarray:
        weight = self._read()
        assert isinstance(weight, Codes), type(weight)
        self._scales = weight.scales
        return weight.values

    def scales(self) -> np.ndarray:
        scales, self._scales = self._scales, None
        assert scales is not None
        return scales


def _split(groups: Sequence[Group], limit: int) -> Iterator[list[Group]]:
    file: list[Group] = []
    size = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if file and size + nbytes > limit:
            yield file
            file, size = [], 0
        file.append(group)
        size += nbytes
    yield file


def _index(files: Sequence[HubFile]) -> str:
    weight_map = {t.name: file.name for file in files for group in file.groups for t in group}
    index = {"metadata": {"total_size": sum(f.nbytes for f in files)}, "weight_map": weight_map}
    return json.dumps(index, indent=2) + "\n"
