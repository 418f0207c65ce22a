"""`dskjax info`: what a model is made of, and what it costs to hold."""

import dataclasses
import math
import typing
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.table import Table

from dskjax import roofline
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import abstract, count, is_weight, nbytes
from dskjax.quantise import Precision, quantise
from pallas_kernels import QTensor

Stored = typing.Literal["float32", "bfloat16", "fp8", "w4afp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model, the router's selection biases included.

    Attributes:
        total: trunk, embedding and head; MTP modules not counted.
        active: of these, what one token uses (the whole embedding and head, and the chosen
            experts).
        mtp: all MTP modules; their embedding and head are the trunk's.
    """

    total: int
    active: int
    mtp: int


def parameter_counts(cfg: ModelConfig) -> Counts:
    """Counts parameters from the declared shapes; no array is made."""
    specs = param_specs(cfg)
    mtp = count(specs.pop("mtp_layers", {}))
    total = count(specs)
    idle = 0
    if cfg.moe is not None:
        expert = 3 * cfg.hidden_size * cfg.moe.moe_intermediate_size
        idle = (
            cfg.num_moe_layers * (cfg.moe.n_routed_experts - cfg.moe.num_experts_per_tok) * expert
        )
    return Counts(total=total, active=total - idle, mtp=mtp)


def weight_bytes(
    cfg: ModelConfig, stored: Stored, *, mtp: bool = False, int4_scale_bytes: int = 4
) -> int:
    """Bytes of all weights, scales included, from the declared shapes.

    Args:
        cfg: the model.
        stored: a dtype for all weights, or a precision of `dskjax.quantise` with the rest in bf16.
        mtp: weights of the MTP modules instead of the trunk's.
        int4_scale_bytes: 4 as dskjax holds scales of int4 weights, 2 where they are bf16.
    """
    dtype = stored if stored in ("float32", "bfloat16") else "bfloat16"
    trunk = abstract(param_specs(cfg), dtype)
    modules = {k: trunk.pop(k) for k in ["mtp_layers"] if k in trunk}
    params = modules if mtp else trunk
    if not params or stored == dtype:
        return nbytes(params)
    out = jax.eval_shape(lambda p: quantise(p, typing.cast(Precision, stored)), params)
    int4 = sum(
        math.prod(leaf.scales.shape)
        for leaf in jax.tree.leaves(out, is_leaf=is_weight)
        if isinstance(leaf, QTensor) and leaf.format == "int4"
    )
    return nbytes(out) - int4 * (4 - int4_scale_bytes)


def describe(cfg: ModelConfig) -> list[tuple[str, str]]:
    """Rows (what, value) of the table that `dskjax info` prints."""
    counts = parameter_counts(cfg)
    rows = [
        ("model_type", cfg.model_type),
        ("layers", f"{cfg.num_dense_layers} dense + {cfg.num_moe_layers} MoE"),
        ("hidden_size / heads", f"{cfg.hidden_size} / {cfg.num_attention_heads}"),
        ("latent / rope dims cached", f"{cfg.mla.kv_lora_rank} / {cfg.mla.qk_rope_head_dim}"),
    ]
    if cfg.moe is not None:
        moe = cfg.moe
        rows.append(
            (
                "experts",
                f"{moe.num_experts_per_tok} of {moe.n_routed_experts} routed + "
                f"{moe.n_shared_experts} shared, {moe.topk_method}",
            )
        )
    modules = cfg.mtp.num_nextn_predict_layers
    rows += [
        ("MTP modules", f"{modules} ({cfg.mtp.scheme})" if modules else "none"),
        ("parameters", f"{counts.total:,}"),
        ("active per token", f"{counts.active:,}"),
        ("parameters of MTP modules", f"{counts.mtp:,}"),
    ]
    rows += [(f"weights in {name}", _weights(cfg, stored)) for stored, name in FORMS.items()]
    rows += [(f"cache per token in {name}", _cache(cfg, layout)) for layout, name in CACHES.items()]
    rows.append(("max_position_embeddings", f"{cfg.max_position_embeddings:,}"))
    return rows


FORMS: dict[Stored, str] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "fp8": "fp8 (blocks 128x128)",
    "w4afp8": "fp8, experts int4",
}
"""Forms of weights that `dskjax info` lists, with their names there."""

CACHES: dict[roofline.CacheLayout, str] = {
    "bf16": "bfloat16",
    "fp8_tensor": "fp8 (one scale)",
    "fp8_tile": "fp8 (tiles of 128)",
}
"""Layouts of the cache that `dskjax info` lists, with their names there."""


def _weights(cfg: ModelConfig, stored: Stored) -> str:
    if stored == "w4afp8" and cfg.moe is not None:
        if cfg.hidden_size % 2 or cfg.moe.moe_intermediate_size % 2:
            return "impossible: int4 packs pairs, and a width is odd"
    text = human_bytes(weight_bytes(cfg, stored))
    if cfg.mtp.num_nextn_predict_layers:
        text += f" + {human_bytes(weight_bytes(cfg, stored, mtp=True))} in MTP modules"
    if stored == "w4afp8" and cfg.moe is not None:
        small = human_bytes(weight_bytes(cfg, stored, int4_scale_bytes=2))
        text += f"; trunk with bf16 scales {small}"
    return text


def _cache(cfg: ModelConfig, layout: roofline.CacheLayout) -> str:
    text = f"{roofline.cache_bytes_per_token(cfg, layout):,} bytes"
    if cfg.mtp.num_nextn_predict_layers:
        trunk = roofline.cache_bytes_per_token(cfg, layout, mtp=False)
        text += f" ({trunk:,} without MTP modules)"
    return text


def human_bytes(size: int | float) -> str:
    """A size with a decimal unit (1 GB = 10^9 bytes)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sequences per GPU that `dskjax info --gpu` bounds."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A roofline row: the floor of a step, and whether it fits the GPU's memory."""

    floor: roofline.Floor
    fits: bool


def roofline_rows(
    cfg: ModelConfig,
    gpu: str,
    *,
    ep: int,
    context: int,
    drafts: int,
    experts: str,
    cache: str,
    tp: int = 1,
    redundant: int = 0,
) -> list[Bound]:
    """Bounds a decode step for each of `BATCHES`.

    Raises:
        ValueError: an unknown GPU, expert format or cache layout, or a size below its least value.
    """
    if drafts < 0 or context < 1:
        raise ValueError(f"{drafts=} must be 0 or more, and {context=} 1 or more")
    for name, value, known in (
        ("experts", experts, roofline.EXPERT_BYTES),
        ("cache", cache, CACHES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    forms: dict[str, typing.Any] = dict(experts=experts, cache=cache, tp=tp, redundant=redundant)
    rows = []
    for batch in BATCHES:
        floor = roofline.roofline(cfg, gpu, batch, context, ep, 1 + drafts, **forms)
        needed = roofline.memory_needed(cfg, batch, context, ep, **forms)
        rows.append(Bound(floor, needed <= roofline.GPUS[gpu].memory))
    return rows


def roofline_table(rows: Sequence[Bound], title: str) -> Table:
    """The rows in milliseconds."""
    table = Table(title=f"least decode step in ms, one token a sequence: {title}")
    for name in (
        "batch/GPU",
        "weights",
        "cache",
        "linear",
        "core",
        "step",
        "tokens/s",
        "bound",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        f = row.floor
        times = (f"{1e3 * t:.2f}" for t in (f.weights, f.cache, f.linear, f.core, f.step))
        bound = f.bound if row.fits else "too big"
        table.add_row(str(f.batch), *times, f"{f.tokens_per_second:,.0f}", bound)
    return table


def plot_roofline(rows: Sequence[Bound], path: Path) -> Path:
    """Draws memory time, compute time and step time over the batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = [row.floor.batch for row in rows]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    lines = {
        "memory": [row.floor.weights + row.floor.cache for row in rows],
        "compute": [row.floor.linear + row.floor.core for row in rows],
    }
    for label, seconds in lines.items():
        axes.loglog(batches, [1e3 * s for s in seconds], marker="o", label=label)
    missing = [row for row in rows if not row.fits]
    at = ([row.floor.batch for row in missing], [1e3 * row.floor.step for row in missing])
    if missing:
        axes.loglog(*at, "x", color="black", label="too big for the memory")
    axes.set(xlabel="sequences per GPU", ylabel="ms per step", title="least decode step")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
