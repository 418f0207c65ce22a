"""From one checkpoint folder to another, weight by weight: other shards, other forms, other kind.

The result is what loading, changing and saving would give, but no more than a weight (a layer, on
the way to or from Orbax) is in memory. It goes on after a kill (`resume`): files that are done are
not made again.
"""

import dataclasses
import errno
import fnmatch
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dskjax.checkpoint import hub, stream
from dskjax.checkpoint.folder import WEIGHTS, copy_file, write_text
from dskjax.checkpoint.from_hub import HubSource
from dskjax.checkpoint.from_orbax import OrbaxSource
from dskjax.checkpoint.hf import check_options
from dskjax.checkpoint.orbax_index import ACTIVATIONS, INDEX, Index
from dskjax.checkpoint.orbax_params import OrbaxFile, orbax_files
from dskjax.checkpoint.recast import Change, Quantising
from dskjax.checkpoint.resume import Piece, Pieces, bytes_there, resuming
from dskjax.checkpoint.save import MAX_SHARD_BYTES, HubFile, HubPlan, config_text, dtype_field
from dskjax.checkpoint.shards import PICKLED, read_json
from dskjax.checkpoint.weights import check_rows
from dskjax.config import ModelConfig
from dskjax.quantise import Precision

FORMATS = ("hf", "orbax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of a checkpoint.

    Attributes:
        to: kind of the new folder: Hugging Face or Orbax.
        dtype: of floats: bfloat16, float16, float32; None takes that of the stored embedding.
        dequantise: make floats of quantized weights.
        quantise: quantise to "fp8" or "w4afp8" (`dskjax.quantise`).
        max_shard_bytes: see `save_hf`.

    Raises:
        ValueError: a value that is none of these, or two that exclude each other.
    """

    to: str = "hf"
    dtype: Any = None
    dequantise: bool = False
    quantise: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self):
        check_options(self.dtype, "keep", "stacked")
        if self.to not in FORMATS:
            raise ValueError(f"to={self.to!r} must be one of {', '.join(FORMATS)}")
        if self.quantise is not None and self.quantise not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ValueError(f"quantise={self.quantise!r} must be one of {known}")
        if self.dequantise and self.quantise:
            raise ValueError("dequantise and quantise exclude each other: choose one")
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={self.max_shard_bytes} must be positive")

    @property
    def change(self) -> Change:
        """What becomes of the weights."""
        dtype = None if self.dtype is None else np.dtype(self.dtype)
        precision: Any = self.quantise
        return Change(dtype=dtype, dequantise=self.dequantise, precision=precision)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; equal conversions have equal ones."""
        dtype = None if self.dtype is None else np.dtype(self.dtype).name
        return dataclasses.asdict(self) | {"dtype": dtype}


def convert(
    source: str | Path,
    target: str | Path,
    conversion: Conversion,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Converts a checkpoint folder.

    Tokenizer, templates, model card and whatever else lies beside the weights is copied along.

    Args:
        source: a Hugging Face or Orbax folder, or `org/name` on the hub.
        target: the folder to make; it appears complete or not at all. An interrupted call leaves
            `.NAME.part` beside it, with which the same call goes on.
        conversion: what to make.
        revision: branch, tag or commit on the hub.
        overwrite: replace a checkpoint folder at `target`, and drop what another conversion left.
        progress: draw a progress bar.

    Raises:
        CheckpointError, NotImplementedError: the source, as `load_hf`; or weights that no Hugging
            Face folder holds.
        FileExistsError: `target` holds something, and `overwrite` is false or it is no checkpoint.
        ValueError: too little room on the disk, another conversion was begun there, or `source`
            lies in `target`.
    """
    folder, place = hub.find(source, revision=revision, progress=progress), Path(target).resolve()
    if folder.resolve().is_relative_to(place):
        raise ValueError(f"{place} holds the source, {folder}; choose another place")
    kind = OrbaxSource if (folder / INDEX).exists() else HubSource
    with kind(folder, conversion.change) as weights:
        plan = _Plan.of(folder, weights, conversion)
        _check_room(place, plan.nbytes)
        job = {"version": 1, "conversion": conversion.to_json(), "source": _state(folder)}
        title = f"{folder.name} -> {place.name}"
        with stream.bar(title, plan.nbytes if progress else None) as report:
            try:
                with resuming(place, job, overwrite=overwrite, report=report) as pieces:
                    if not pieces.complete:
                        _write(plan, pieces, report)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise ValueError(
                    f"{place}: the disk is full; free some space and give the same command again, "
                    "which keeps what is done"
                ) from error


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be written, in this order.

    Attributes:
        files: of weights.
        beside: files that are copied.
        texts: other files, when it is known what those of weights became.
    """

    files: Sequence[HubFile | OrbaxFile]
    beside: Sequence[Path]
    texts: Callable[[Mapping[str, Piece]], dict[str, str]]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(file.nbytes for file in self.files)

    @classmethod
    def of(cls, folder: Path, source: HubSource | OrbaxSource, conversion: Conversion) -> "_Plan":
        change = conversion.change
        weights = Quantising(source, change) if change.precision else source
        if change.precision and source.file_order:
            check_rows(weights, file_order=False)  # or nothing could load the result
        same = not (change.precision or change.dequantise)
        scales = list(source.activation_scales()) if same else []
        beside, config = _beside(folder), read_json(folder / "config.json")
        if conversion.to == "hf":
            plan = HubPlan.of(
                weights, source.copies, more=scales, max_shard_bytes=conversion.max_shard_bytes
            )
            text = _config(config, source.cfg, plan.config_fields, same)
            return cls(plan.files, beside, lambda pieces: plan.texts | {"config.json": text})
        files: list[HubFile | OrbaxFile] = [*orbax_files(weights)]
        if scales:
            files.append(HubFile(ACTIVATIONS, tuple((scale,) for scale in scales), {}))
        fields = dtype_field(weights.leaves)
        if same and "quantization_config" in config:
            fields["quantization_config"] = config["quantization_config"]
        text = _config(config, source.cfg, fields, same)

        def texts(pieces: Mapping[str, Piece]) -> dict[str, str]:
            index = Index(leaves=weights.leaves, parts=pieces, copies=tuple(source.copies))
            return {"config.json": text, INDEX: index.text()}

        return cls(files, beside, texts)


def _write(plan: _Plan, pieces: Pieces, report: Callable[[int], object]) -> None:
    for file in plan.files:
        if file.name not in pieces.done:
            file.write(pieces.folder, report)
            pieces.finish(file.name)
    pieces.wait()
    for path in plan.beside:
        copy_file(path, pieces.folder / path.name)
    for name, text in plan.texts(pieces.done).items():
        write_text(pieces.folder / name, text)


def _config(
    base: Mapping[str, Any], cfg: ModelConfig, fields: Mapping[str, Any], same: bool
) -> str:
    """The text of the new `config.json`: the old one, but for what has changed.

    Args:
        base: the old one.
        cfg: the model.
        fields: what the weights put into it.
        same: quantized weights are as they were.
    """
    old, new = base.get("quantization_config"), fields.get("quantization_config")
    kept = {name: value for name, value in base.items() if name != "quantization_config"}
    if new is not None:
        # The old one may say more: which modules are not quantized, how scales were rounded.
        said = same and isinstance(old, dict) and old.get("quant_method") == new["quant_method"]
        kept["quantization_config"] = old if said else new
    for name in ("dtype", "torch_dtype"):  # the first is the spelling of transformers 5
        if name in base or "dtype" not in base and name == "torch_dtype":
            kept[name] = fields["torch_dtype"]
    if ModelConfig.from_hf(dict(base)) != cfg:
        kept["num_nextn_predict_layers"] = cfg.mtp.num_nextn_predict_layers  # none were there
    return config_text(kept, cfg, {}, {})


def _beside(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(PICKLED)
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHTS)
    ]


def _state(folder: Path) -> dict[str, str]:
    out = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in WEIGHTS):
            stat = path.stat()
            changed = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()
            out[path.name] = f"{stat.st_size} bytes, changed {changed}"
    return out


def _check_room(place: Path, nbytes: int) -> None:
    disk = next(path for path in place.parents if path.exists())
    needed, free = nbytes - bytes_there(place), shutil.disk_usage(disk).free
    if needed > free:
        raise ValueError(
            f"{place} needs {needed / 1e9:.2f} GB, but {disk} has {free / 1e9:.2f} GB free; free "
            "some space or choose another disk"
        )
