"""Operations of a training step per token, and what part of the devices' peak they are (MFU).

Counted are products a model must compute: 2 per weight and token forward, 4 backward for a trained
weight, 2 where only the input's gradient is needed, and attention over half a row on average.
What is computed again to save memory does not count.
"""

import dataclasses
import math

import jax

from dskjax.config import ModelConfig
from dskjax.roofline import GPUS, parts
from train_mtp.recipe import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Turns tokens per second into MFU.

    Attributes:
        flops: operations per token of a step.
        peak: operations per second of all devices together; None if nobody knows.
    """

    flops: float
    peak: float | None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the peak, 0..1; None without a peak or a speed."""
        if self.peak is None or not math.isfinite(tokens_per_s):
            return None
        return tokens_per_s * self.flops / self.peak


def peak_of(precision: Precision) -> float | None:
    """Datasheet FLOP/s of this job's devices in bf16; None for other devices or precisions."""
    words = jax.devices()[0].device_kind.lower().split()  # "NVIDIA H200": an H20 is another GPU
    known = [gpu for name, gpu in GPUS.items() if name in words]
    if precision != "bfloat16" or not known:
        return None
    return known[0].bf16 * jax.device_count()


def attention_flops(cfg: ModelConfig, seq_len: int) -> float:
    """Of one layer, forward, per token, in rows of `seq_len` tokens of one document."""
    width = cfg.mla.qk_head_dim + cfg.mla.v_head_dim
    return 2 * cfg.num_attention_heads * width * seq_len / 2


def trunk_flops(cfg: ModelConfig, seq_len: int) -> float:
    """Of the trunk with its head, forward, per token."""
    p = parts(cfg)
    return p.linear_flops + 2 * p.head + cfg.num_hidden_layers * attention_flops(cfg, seq_len)


def trunk_kinds(cfg: ModelConfig, seq_len: int) -> dict[str, float]:
    """What `trunk_flops` is made of, by kind of kernel."""
    attention = cfg.num_hidden_layers * attention_flops(cfg, seq_len)
    experts = 0.0
    if cfg.moe is not None:
        chosen = cfg.moe.num_experts_per_tok / cfg.moe.n_routed_experts
        experts = 2 * parts(cfg).routed * chosen
    dense = trunk_flops(cfg, seq_len) - attention - experts
    return {"attention": attention, "expert products": experts, "dense products": dense}


def module_flops(cfg: ModelConfig, seq_len: int) -> float:
    """Of one MTP module without the head, forward, per token: a layer with experts and eh_proj."""
    assert cfg.moe is not None
    one, two = (
        dataclasses.replace(cfg, num_hidden_layers=cfg.first_k_dense_replace + n) for n in (1, 2)
    )
    layer = parts(two).linear_flops - parts(one).linear_flops
    return layer + 2 * 2 * cfg.hidden_size**2 + attention_flops(cfg, seq_len)


def pretraining(cfg: ModelConfig, seq_len: int, precision: Precision) -> Speed:
    """Of a step that trains the trunk and all its modules."""
    modules = cfg.mtp.num_nextn_predict_layers
    flops = trunk_flops(cfg, seq_len)
    if modules:
        flops += modules * (module_flops(cfg, seq_len) + 2 * parts(cfg).head)
    return Speed(flops=3 * flops, peak=peak_of(precision))


def heads(cfg: ModelConfig, depths: int, seq_len: int, precision: Precision) -> Speed:
    """Of a step that trains modules for `depths` drafts over a frozen trunk and a frozen head."""
    each = 3 * module_flops(cfg, seq_len) + 2 * 2 * parts(cfg).head
    return Speed(flops=trunk_flops(cfg, seq_len) + depths * each, peak=peak_of(precision))
