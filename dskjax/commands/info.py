"""`dskjax info`: what a model is made of, and what it costs to hold."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from dskjax import roofline
from dskjax.config import ModelConfig
from dskjax.model import param_specs
from dskjax.params import count


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


def cache_bytes_per_token(cfg: ModelConfig, *, itemsize: int = 2, mtp: bool = True) -> int:
    """Bytes the latent cache holds per token: a latent and a rope key per layer."""
    layers = cfg.num_cache_layers if mtp else cfg.num_hidden_layers
    return layers * (cfg.mla.kv_lora_rank + cfg.mla.qk_rope_head_dim) * itemsize


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
    weights = counts.total + counts.mtp
    for name, size in (("float32", 4), ("bfloat16", 2)):
        rows.append((f"weights in {name}", human_bytes(weights * size)))
    for name, size in (("float32", 4), ("bfloat16", 2)):
        rows.append(
            (f"cache per token in {name}", f"{cache_bytes_per_token(cfg, itemsize=size):,} bytes")
        )
    rows.append(("max_position_embeddings", f"{cfg.max_position_embeddings:,}"))
    return rows


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
    cfg: ModelConfig, gpu: str, *, ep: int, context: int, drafts: int, experts: str
) -> list[Bound]:
    """Bounds a decode step for each of `BATCHES`, with an fp8 cache.

    Raises:
        ValueError: an unknown GPU or expert format, or a size below its least value.
    """
    if gpu not in roofline.GPUS:
        raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(roofline.GPUS)}")
    if experts not in roofline.EXPERT_BYTES:
        raise ValueError(f"{experts=} must be one of {', '.join(roofline.EXPERT_BYTES)}")
    if drafts < 0:
        raise ValueError(f"{drafts=} must be 0 or more")
    form = typing.cast(roofline.Experts, experts)
    card, rows = roofline.GPUS[gpu], []
    for batch in BATCHES:
        floor = roofline.decode_floor(
            cfg, card, batch=batch, context=context, ep=ep, verify=1 + drafts, experts=form
        )
        needed = roofline.memory_needed(cfg, batch=batch, context=context, ep=ep, experts=form)
        rows.append(Bound(floor, needed <= card.memory))
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
