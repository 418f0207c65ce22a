"""What a checkpoint folder holds against what its config needs, settled before a value is read."""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np

from dskjax.checkpoint import names
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.schemes import Scheme
from dskjax.checkpoint.shards import Shards
from dskjax.checkpoint.stored import FLOATS, Stored, check, check_dtype, check_shape, locate
from dskjax.config import ModelConfig, MtpConfig
from dskjax.model import param_specs
from dskjax.params import named_leaves

_LOG = logging.getLogger(__name__)

_SUFFIXES = (
    "_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_shape",
    ".weight_packed",
    ".input_scale",
    ".pre_quant_scale",
)
_FOREIGN = {
    ".qweight": "an AutoAWQ or GPTQ checkpoint",
    ".qzeros": "an AutoAWQ or GPTQ checkpoint",
    ".g_idx": "a GPTQ checkpoint",
    ".weight_zero_point": "an asymmetric compressed-tensors checkpoint",
    ".weight_g_idx": "a compressed-tensors checkpoint with an order of inputs",
    ".weight_global_scale": "an NVFP4 checkpoint",
}
_DEQUANTISE = "load with quantised='dequantise' (--dequantise)"


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


def plan(shards: Shards, cfg: ModelConfig, scheme: Scheme | None) -> dict[str, list[Stored]]:
    """The weights that fill each leaf, once names, shapes and dtypes of all tensors are right.

    Raises:
        CheckpointError: at the first difference; names the file, the tensor, expected and found.
        NotImplementedError: a tensor of a kind of checkpoint that is recognised and not supported.
    """
    for name in shards:
        _refuse_known(shards, name)
    found: dict[str, list[Stored]] = {}
    for slot in names.slots(cfg, shards):  # lazily: a hostile config may ask for 10^9 layers
        stored = locate(shards, slot, scheme)
        if stored is None:
            raise CheckpointError(
                f"{shards.folder}: tensor {slot.name!r} is missing; "
                f"expected shape {list(slot.shape)} for {_sizes(cfg)}"
            )
        found.setdefault(slot.leaf, []).append(stored)
    weights = [stored for of_leaf in found.values() for stored in of_leaf]
    wanted = {name for stored in weights for name in stored.names()}
    copies = {name: slot for name in shards if (slot := names.alias_of(name, cfg)) is not None}
    extra = sorted(n for n in set(shards) - wanted - set(copies) if not _harmless(n))
    if extra:
        raise CheckpointError(
            f"{shards.file(extra[0])}: unexpected tensor {extra[0]!r}{_more(extra)}; "
            + _why_unexpected(shards, extra[0], cfg)
        )
    for stored in weights:
        check(shards, stored)
    for name, slot in copies.items():
        check_dtype(shards, name, FLOATS)
        check_shape(shards, name, slot.shape, " from config.json")
        stored = shards.entry(name).dtype
        expected = shards.entry(slot.name).dtype if slot.name in shards else stored
        if stored != expected:
            raise CheckpointError(
                f"{shards.file(name)}: tensor {name!r} has dtype {stored}; "
                f"expected {expected}, for it is a copy of {slot.name!r}"
            )
    if scheme is not None and all(stored.kind is None for stored in weights):
        raise CheckpointError(
            f"{scheme.source} says {scheme.method!r}, but no weight is quantized: "
            f"{weights[0].values!r} and all others are {', '.join(FLOATS)}; "
            "restore the files or the config.json that belong together"
        )
    return found


def check_kept(shards: Shards, cfg: ModelConfig, weights: list[Stored]) -> None:
    """Checks that the weights of one leaf can make one `QTensor`, or one array of floats.

    Raises:
        CheckpointError: they cannot; names two tensors, or one and the reason.
    """
    first = weights[0]
    for other in weights:
        if other.kind != first.kind:
            raise CheckpointError(
                f"{shards.folder}: tensor {first.values!r} is {_describe(first)}, but "
                f"{other.values!r} is {_describe(other)}, and both are parts of "
                f"{first.slot.leaf!r}: {_DEQUANTISE}"
            )
        if other.columns is not None:
            raise CheckpointError(
                f"{shards.file(other.columns)}: tensor {other.columns!r} scales the inputs of a "
                f"quantized weight, which has no place for it: {_DEQUANTISE}"
            )
    if first.kind is None:
        return
    if not names.is_linear(first.slot.leaf):
        raise CheckpointError(
            f"{shards.file(first.values)}: tensor {first.values!r} is quantized; of this weight "
            f"only floats are used: {_DEQUANTISE}"
        )
    order, rows = names.row_order(first.slot.leaf, cfg), first.block[0]
    if order is not None and rows > 1 and (order // rows != np.arange(len(order)) // rows).any():
        raise CheckpointError(
            f"{shards.file(first.values)}: rotary rows of {first.values!r} must be reordered, but "
            f"those of a head lie in more than one block of {rows} rows: {_DEQUANTISE}"
        )


def _describe(stored: Stored) -> str:
    if stored.kind is None:
        return "not quantized"
    return f"{stored.kind[0]} with a scale for each {stored.block[0]}x{stored.block[1]}"


def warn_of_narrowing(
    shards: Shards, cfg: ModelConfig, found: dict[str, list[Stored]], target: np.dtype
) -> None:
    """Logs a warning when weights lose bits because all params take the embedding's dtype."""
    fixed = {leaf for leaf, spec in named_leaves(param_specs(cfg)) if spec.dtype}
    loose = [
        stored.values
        for leaf, weights in found.items()
        if leaf not in fixed
        for stored in weights
        if stored.form == "plain"
    ]
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


def _harmless(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")  # in old exports; it follows from the config


def _refuse_known(shards: Shards, name: str) -> None:
    where = f"{shards.file(name)}: tensor {name!r}"
    if ".indexer." in name:
        raise NotImplementedError(
            f"{where} belongs to the lightning indexer of DeepSeek-V3.2 (sparse attention), "
            "which dskjax does not have"
        )
    for suffix, what in _FOREIGN.items():
        if name.endswith(suffix):
            raise NotImplementedError(
                f"{where} belongs to {what}, which is not read; convert the checkpoint to FP8, "
                "symmetric compressed-tensors int4 or BF16"
            )


def _why_unexpected(shards: Shards, name: str, cfg: ModelConfig) -> str:
    for suffix in _SUFFIXES:
        weight = name.removesuffix(suffix).removesuffix(".weight") + ".weight"
        if name.endswith(suffix) and weight in shards:
            return (
                f"its weight {weight!r} has dtype {shards.entry(weight).dtype} and no use for it: "
                "restore the files that belong together"
            )
    return f"expected only those of a model with {_sizes(cfg)}"


def _more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _sizes(cfg: ModelConfig) -> str:
    experts = cfg.moe.n_routed_experts if cfg.moe is not None else 0
    return (
        f"num_hidden_layers={cfg.num_hidden_layers}, "
        f"first_k_dense_replace={cfg.first_k_dense_replace}, n_routed_experts={experts}, "
        f"num_nextn_predict_layers={cfg.mtp.num_nextn_predict_layers} (config.json)"
    )
