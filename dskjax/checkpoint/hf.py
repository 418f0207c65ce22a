"""Hugging Face checkpoint folders: `config.json` and safetensors, read bit for bit.

Loading settles every name, shape and dtype (`inventory`, `stored`) before it reads a value, so what
comes back is complete, or an error. All arrays are made up front (`buffers`); then tensors are read
in the order of the files (`stream`) straight into them, each device getting its own parts only.
The one change on the way: rotary rows that are stored interleaved are put in half-split order
(`names.row_order`). `save` writes such folders.
"""

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dskjax.axes import Sharding
from dskjax.checkpoint import inventory, leaves, names, schemes, stream
from dskjax.checkpoint.leaves import Leaf
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.shards import Shards, check_folder, read_json
from dskjax.checkpoint.stored import FLOATS, Stored
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import Params, WeightSpec, named_leaves, tree_of

_QUANTISED = ("keep", "dequantise")
_LAYERS = ("stacked", "separate")
_TOO_LARGE = 2**31  # for any number in a config; from 2**62 on, shapes break inside JAX
_LAYERED = ("dense_layers", "moe_layers", "mtp_layers")


def load_config(path: str | Path) -> ModelConfig:
    """The model that the `config.json` in a folder describes.

    Raises:
        CheckpointError: no folder, no file, no JSON, or a field that does not fit; names the file.
        NotImplementedError: a model that is recognised and not supported.
    """
    check_folder(Path(path))
    file = Path(path) / "config.json"
    config = read_json(file)
    for name, value in config.items():
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise CheckpointError(
                f"{file}: field {name!r} = {value}; expected less than {_TOO_LARGE}"
            )
    try:
        return ModelConfig.from_hf(config)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # the last two: a value of odd type
        raise CheckpointError(f"{file}: {error}") from error


def load_hf(
    path: str | Path,
    *,
    dtype: Any | None = None,
    quantised: str = "keep",
    sharding: Sharding | None = None,
    layers: str = "stacked",
    progress: bool = False,
) -> tuple[Params, ModelConfig]:
    """Loads a checkpoint folder.

    Weights may be BF16, F16 or F32, or quantized as `quantization_config` says (`schemes`). MTP
    modules that the config declares but no file has a tensor of are dropped from the returned
    config, with a logged warning. Copies of the embedding and the head in MTP modules are not read.
    Memory beside the result: a few MiB a thread, never a leaf.

    Args:
        path: folder with `config.json` and `model.safetensors`, or the index and its shards.
        dtype: bfloat16, float16 or float32 for floats; None takes that of the stored embedding.
            Weights that fix their dtype (the gate's bias) keep it.
        quantised: what becomes of quantized weights. "keep": a `QTensor` with the stored bits and
            float32 scales. "dequantise": floats, scaled in float32 and cast last.
        sharding: where the parts go; a process reads no more than its own. None: the first device.
        layers: "stacked", or "separate": what `dskjax.params.unstack` makes of that.
        progress: draw a progress bar.

    Returns:
        Params as `model.param_specs(config)` tells, and the config.

    Raises:
        CheckpointError: anything missing, unexpected, damaged or misshapen; names the file, the
            tensor, what was expected and what was found.
        NotImplementedError: a model or checkpoint of a kind that is recognised and not supported.
        ValueError: another `dtype`, `quantised` or `layers`.
    """
    folder = Path(path)
    check_options(dtype, quantised, layers)
    cfg = load_config(folder)
    scheme = schemes.of_folder(folder)
    with contextlib.ExitStack() as stack:
        with _collector_paused():
            shards = stack.enter_context(Shards(folder))
            cfg = inventory.without_absent_mtp(shards, cfg)
            plan = inventory.plan(shards, cfg, scheme)
            if dtype is None:
                target = stored_dtype(shards)
                inventory.warn_of_narrowing(shards, cfg, plan, target)
            else:
                target = np.dtype(dtype)
            pieces = list(_pieces(cfg, plan, separate=layers == "separate"))
            if keep := quantised == "keep":
                for piece in pieces:
                    inventory.check_kept(shards, cfg, piece.weights)
            prepared = [(p, _leaf(shards, cfg, p, target, keep, sharding)) for p in pieces]
        stream.run(
            (job for _, leaf in prepared for job in leaf.jobs),
            title=f"loading {folder.name}",
            progress=progress,
        )
        return _tree(prepared), cfg


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes a million small objects for a large model, all to be kept: looking for garbage
    among them would take longer than making them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_options(dtype: Any, quantised: str, layers: str) -> None:
    """Raises ValueError when an option of `load_hf` is none of its values."""
    if dtype is not None and np.dtype(dtype) not in map(np.dtype, FLOATS.values()):
        raise ValueError(f"dtype={dtype} must be bfloat16, float16, float32 or None")
    if quantised not in _QUANTISED:
        raise ValueError(f"{quantised=} must be one of {', '.join(_QUANTISED)}")
    if layers not in _LAYERS:
        raise ValueError(f"{layers=} must be one of {', '.join(_LAYERS)}")


def stored_dtype(shards: Shards) -> np.dtype:
    """Dtype of the stored embedding, which is that of params."""
    code = shards.entry(names.EMBEDDING).dtype if names.EMBEDDING in shards else "BF16"
    return np.dtype(FLOATS.get(code, FLOATS["BF16"]))  # a quantized embedding has none of its own


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A leaf, or a layer of one when layers are separate, and what the files have for it."""

    path: str
    layer: int | None
    spec: WeightSpec
    weights: list[Stored]


def _pieces(cfg: ModelConfig, plan: dict[str, list[Stored]], *, separate: bool) -> Iterator[_Piece]:
    for path, spec in named_leaves(param_specs(cfg)):
        if not separate or path.partition(".")[0] not in _LAYERED:
            yield _Piece(path, None, spec, plan[path])
            continue
        own = WeightSpec(spec.shape[1:], spec.axes[1:], spec.init, spec.dtype)
        for layer, weights in itertools.groupby(plan[path], lambda stored: stored.slot.index[0]):
            yield _Piece(path, layer, own, [_in_layer(stored) for stored in weights])


def _in_layer(stored: Stored) -> Stored:
    slot = dataclasses.replace(stored.slot, index=stored.slot.index[1:])
    return dataclasses.replace(stored, slot=slot)


def _leaf(
    shards: Shards,
    cfg: ModelConfig,
    piece: _Piece,
    dtype: np.dtype,
    keep: bool,
    sharding: Sharding | None,
) -> Leaf:
    order = names.row_order(piece.path, cfg)
    if keep and piece.weights[0].kind is not None:
        return leaves.quantised(shards, piece.weights, piece.spec, order, sharding)
    dtype = np.dtype(piece.spec.dtype or dtype)
    return leaves.floats(shards, piece.weights, piece.spec, dtype, order, sharding)


def _tree(prepared: Iterable[tuple[_Piece, Leaf]]) -> Params:
    whole: dict[str, Any] = {}
    layered: dict[str, dict[int, dict[str, Any]]] = {}
    for piece, leaf in prepared:
        if piece.layer is None:
            whole[piece.path] = leaf.finish()
        else:
            group, _, own = piece.path.partition(".")
            layered.setdefault(group, {}).setdefault(piece.layer, {})[own] = leaf.finish()
    separate = {group: tuple(map(tree_of, of.values())) for group, of in layered.items()}
    return {**tree_of(whole), **separate}
