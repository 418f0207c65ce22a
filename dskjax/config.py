"""The shape of a DeepSeek model, in the words of its Hugging Face `config.json`.

`ModelConfig` is frozen, keyword-only and nested by part; it describes the model and nothing else
(mesh, dtype and kernel choice are arguments elsewhere). `ModelConfig.from_hf` reads a `config.json`
of the supported families and refuses what it does not understand: a field that could change the
numbers is an error, never a warning.
"""

import dataclasses
import math
from typing import Any, Literal

TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunc = Literal["softmax", "sigmoid"]
MtpScheme = Literal["chain", "recycled"]
ModelType = Literal["deepseek_v2", "deepseek_v3", "kimi_k2"]

GATES: dict[TopkMethod, ScoringFunc] = {
    "noaux_tc": "sigmoid",
    "greedy": "softmax",
    "group_limited_greedy": "softmax",
}
"""How each gate scores experts. noaux_tc: V3 family, Moonlight, Kimi-K2; greedy: V2-Lite;
group_limited_greedy: V2.
"""


def _positive(part: Any, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(part).__name__}.{name}={value!r} must be a positive integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1).

    `norm_eps` is the epsilon of q_a_layernorm and kv_a_layernorm. Hugging Face builds both with
    1e-6 whatever `rms_norm_eps` says; so does this default.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _positive(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if not self.norm_eps > 0:
            raise ValueError(f"{self.norm_eps=} must be positive")
        if self.q_lora_rank is not None:
            _positive(self, "q_lora_rank")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"{self.qk_rope_head_dim=} must be even: rotary channels come in pairs"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: nope part first, rope part last."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed and shared experts (DeepSeekMoE; DeepSeek-V3 report, section 2.1.2).

    `num_redundant_experts` is no part of the model and in no `config.json`: so many slots for
    replicas of experts do the params of this run have beyond one for each expert (see
    `dskjax.expert_parallel.place`).
    """

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_group: int = 1
    topk_group: int = 1
    topk_method: TopkMethod = "noaux_tc"
    scoring_func: ScoringFunc = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_redundant_experts: int = 0

    def __post_init__(self) -> None:
        _positive(
            self,
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        )
        if self.n_shared_experts < 0:
            raise ValueError(f"{self.n_shared_experts=} must not be negative")
        if self.num_redundant_experts < 0:
            raise ValueError(f"{self.num_redundant_experts=} must not be negative")
        if GATES.get(self.topk_method) != self.scoring_func:
            known = ", ".join(f"{method} with {score}" for method, score in GATES.items())
            raise ValueError(
                f"{self.topk_method=} with {self.scoring_func=} is not a supported gate; "
                f"supported: {known}"
            )
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            raise ValueError(
                f"norm_topk_prob=true with topk_method={self.topk_method!r} is not supported: "
                "implementations disagree on it"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"{self.n_routed_experts=} must be a multiple of {self.n_group=}")
        if self.topk_group > self.n_group:
            raise ValueError(f"{self.topk_group=} must not exceed {self.n_group=}")
        groups = self.n_group if self.topk_method == "greedy" else self.topk_group
        allowed = self.n_routed_experts // self.n_group * groups
        if self.num_experts_per_tok > allowed:
            raise ValueError(
                f"{self.num_experts_per_tok=} exceeds the {allowed} experts that {groups} groups "
                "hold"
            )
        if (
            self.topk_method == "noaux_tc"
            and self.n_group > 1
            and self.n_routed_experts // self.n_group < 2
        ):
            raise ValueError(
                f"{self.n_group=} leaves fewer than 2 experts a group; the group score sums the "
                "best 2"
            )

    @property
    def num_slots(self) -> int:
        """Physical experts: one for each routed expert, and the redundant ones."""
        return self.n_routed_experts + self.num_redundant_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv:2309.00071) as DeepSeek applies it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"{self.factor=} must be at least 1")
        _positive(self, "original_max_position_embeddings")

    @property
    def attention_factor(self) -> float:
        """Multiplier of cos and sin: m(mscale) / m(mscale_all_dim), exactly 1 for every public
        DeepSeek model.
        """
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of the decoupled rope channels.

    `rope_interleave` tells how the *checkpoint* stores rotary channels; the loader permutes
    interleaved ones once, so that every array inside dskjax, caches included, is in half-split
    order.
    """

    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        if not self.rope_theta > 0:
            raise ValueError(f"{self.rope_theta=} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """Multi-token prediction modules (DeepSeek-V3 report, section 2.2)."""

    num_nextn_predict_layers: int = 0
    mtp_scheme: MtpScheme | None = None

    def __post_init__(self) -> None:
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"{self.num_nextn_predict_layers=} must not be negative")
        if self.mtp_scheme not in (None, "chain", "recycled"):
            raise ValueError(f"mtp_scheme={self.mtp_scheme!r} must be 'chain' or 'recycled'")
        if self.mtp_scheme == "recycled" and self.num_nextn_predict_layers > 1:
            raise ValueError(
                f"mtp_scheme='recycled' reuses one module, but {self.num_nextn_predict_layers=}; "
                "use 'chain' or keep one module"
            )

    @property
    def scheme(self) -> MtpScheme:
        """How drafts are made: one module recycled, or a chain of independent modules."""
        return self.mtp_scheme or ("recycled" if self.num_nextn_predict_layers == 1 else "chain")

    @property
    def max_drafts(self) -> int | None:
        """The most tokens that can be drafted a step; None when a recycled module sets no limit."""
        if self.num_nextn_predict_layers and self.scheme == "recycled":
            return None
        return self.num_nextn_predict_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of DeepSeek's V2 or V3 architecture. Field names are those of the Hugging Face
    `config.json`.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    mla: MlaConfig
    moe: MoeConfig | None
    first_k_dense_replace: int = 0
    rope: RopeConfig = RopeConfig()
    mtp: MtpConfig = MtpConfig()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        _positive(self, "max_position_embeddings")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"{self.rms_norm_eps=} must be positive")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"{self.first_k_dense_replace=} must lie in 0..{self.num_hidden_layers=}"
            )
        if self.moe is None and self.first_k_dense_replace != self.num_hidden_layers:
            raise ValueError(
                f"without experts every layer is dense: set {self.first_k_dense_replace=} to "
                "num_hidden_layers"
            )
        if self.moe is None and self.mtp.num_nextn_predict_layers:
            raise ValueError(
                "MTP modules are mixture-of-experts layers; a model without experts cannot have "
                "them"
            )

    @property
    def num_dense_layers(self) -> int:
        """Layers 0..num_dense_layers-1 have a dense MLP; the rest have experts."""
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Trunk layers with experts (MTP modules not counted)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_cache_layers(self) -> int:
        """Layers of the latent cache: trunk layers, then one per MTP module."""
        return self.num_hidden_layers + self.mtp.num_nextn_predict_layers

    @property
    def softmax_scale(self) -> float:
        """Scale of attention scores: qk_head_dim^-0.5, times YaRN's mscale squared (DeepSeek's
        `mscale_all_dim`).
        """
        scale = self.mla.qk_head_dim**-0.5
        yarn = self.rope.yarn
        if yarn is not None and yarn.mscale_all_dim:
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """Reads a parsed Hugging Face `config.json`; see `dskjax.config_hf.from_hf` for what it
        takes and raises.
        """
        from dskjax.config_hf import from_hf

        return from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` object of this model; `from_hf` reads it back to an equal
        `ModelConfig`.
        """
        from dskjax.config_hf import to_hf

        return to_hf(self)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN attention factor m(f, a) = 0.1 a ln f + 1, and 1 for f <= 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
