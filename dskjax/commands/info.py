"""`dskjax info`: what a model is made of, and what it costs to hold."""

import dataclasses

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
