"""What a checkpoint folder holds against what its config needs, settled before a value is read."""

import dataclasses
import logging

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dskjax.checkpoint import names
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.shards import Shards
from dskjax.config import ModelConfig, MtpConfig
from dskjax.model import param_specs
from dskjax.params import named_leaves

_LOG = logging.getLogger(__name__)

FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""Dtypes of weights that are loaded and saved, by their safetensors code."""

_QUANTIZED_DTYPES = ("F8", "F6", "F4", "I8", "U8", "I32")
_QUANTIZED_NAMES = (".weight_scale_inv", ".weight_scale", ".weight_packed", ".qweight", ".qzeros")


def without_absent_mtp(shards: Shards, cfg: ModelConfig) -> ModelConfig:
    """The config without MTP modules when the files have not one tensor of them, else as it is.

    transformers drops the modules when it saves a model and keeps the field that declares them.
    """
    modules = cfg.mtp.num_nextn_predict_layers
    if not modules or any(names.is_mtp(name, cfg) for name in shards):
        return cfg
    _LOG.warning(
        "%s: config.json declares num_nextn_predict_layers=%d, but the files hold no tensor of "
        "model.layers.%d and on; loading the trunk without MTP modules",
        shards.folder,
        modules,
        cfg.num_hidden_layers,
    )
    return dataclasses.replace(cfg, mtp=MtpConfig())


def plan(shards: Shards, cfg: ModelConfig) -> dict[str, list[Slot]]:
    """The slots that fill each leaf, once names, shapes and dtypes of all tensors are right.

    Raises:
        CheckpointError: at the first difference; names the file, the tensor, expected and found.
        NotImplementedError: a tensor of a kind of checkpoint that is recognised and not supported.
    """
    for name in shards:
        _refuse_known(shards, name)
    found: dict[str, list[Slot]] = {}
    wanted: dict[str, Slot] = {}
    for slot in names.slots(cfg, shards):  # lazily: a hostile config may ask for 10^9 layers
        if slot.name not in shards:
            raise CheckpointError(
                f"{shards.folder}: tensor {slot.name!r} is missing; "
                f"expected shape {list(slot.shape)} for {_sizes(cfg)}"
            )
        found.setdefault(slot.leaf, []).append(slot)
        wanted[slot.name] = slot
    copies = {name: slot for name in shards if (slot := names.alias_of(name, cfg)) is not None}
    extra = sorted(n for n in set(shards) - set(wanted) - set(copies) if not _harmless(n))
    if extra:
        raise CheckpointError(
            f"{shards.file(extra[0])}: unexpected tensor {extra[0]!r}{_more(extra)}; "
            f"expected only those of a model with {_sizes(cfg)}"
        )
    for name, slot in [*wanted.items(), *copies.items()]:
        _check_tensor(shards, name, slot)
    for name, slot in copies.items():
        stored, expected = shards.entry(name).dtype, shards.entry(slot.name).dtype
        if stored != expected:
            raise CheckpointError(
                f"{shards.file(name)}: tensor {name!r} has dtype {stored}; "
                f"expected {expected}, for it is a copy of {slot.name!r}"
            )
    return found


def warn_of_narrowing(
    shards: Shards, cfg: ModelConfig, found: dict[str, list[Slot]], target: np.dtype
) -> None:
    """Logs a warning when weights lose bits because all params take the embedding's dtype."""
    fixed = {leaf for leaf, spec in named_leaves(param_specs(cfg)) if spec.dtype}
    loose = [slot.name for leaf, slots in found.items() if leaf not in fixed for slot in slots]
    exact = {code for code, kind in FLOATS.items() if jnp.promote_types(kind, target) == target}
    if narrowed := [name for name in loose if shards.entry(name).dtype not in exact]:
        _LOG.warning(
            "%s: tensor %r%s is stored as %s, but params take the embedding's dtype, %s; "
            "pass dtype=float32 to keep every bit",
            shards.file(narrowed[0]),
            narrowed[0],
            _more(narrowed),
            shards.entry(narrowed[0]).dtype,
            target,
        )


def _check_tensor(shards: Shards, name: str, slot: Slot) -> None:
    entry, where = shards.entry(name), f"{shards.file(name)}: tensor {name!r}"
    if entry.shape != slot.shape:
        raise CheckpointError(
            f"{where} has shape {list(entry.shape)}; expected {list(slot.shape)} from config.json"
        )
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{where} has dtype {entry.dtype}; expected {', '.join(FLOATS)}: "
            + ("quantized weights are not " if _looks_quantized(entry.dtype) else "it cannot be ")
            + "loaded yet, convert the checkpoint to BF16 first"
        )


def _looks_quantized(dtype: str) -> bool:
    return dtype.startswith(_QUANTIZED_DTYPES)


def _harmless(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")  # in old exports; it follows from the config


def _refuse_known(shards: Shards, name: str) -> None:
    where = f"{shards.file(name)}: tensor {name!r}"
    if ".indexer." in name:
        raise NotImplementedError(
            f"{where} belongs to the lightning indexer of DeepSeek-V3.2 (sparse attention), "
            "which dskjax does not have"
        )
    if name.endswith(_QUANTIZED_NAMES):
        raise NotImplementedError(
            f"{where} belongs to a quantized checkpoint; "
            "these are not loaded yet, convert the checkpoint to BF16 first"
        )


def _more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _sizes(cfg: ModelConfig) -> str:
    experts = cfg.moe.n_routed_experts if cfg.moe is not None else 0
    return (
        f"num_hidden_layers={cfg.num_hidden_layers}, "
        f"first_k_dense_replace={cfg.first_k_dense_replace}, n_routed_experts={experts}, "
        f"num_nextn_predict_layers={cfg.mtp.num_nextn_predict_layers} (config.json)"
    )
