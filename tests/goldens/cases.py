"""What each golden is made from: the committed cases, and random ones of the same families.

Nothing here computes: a `Case` names a tiny config, how its files look, and a seed.
`scripts/make_goldens.py` turns it into a folder; tests may read `CASES` for the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one golden is made from; everything else follows from these and the seed."""

    name: str
    seed: int
    base: Config  # the fields every config style shares
    rope: Config  # rope_theta, and the YaRN fields if any
    style: str = (
        "hub"  # "hub" (rope_scaling, as DeepSeek publishes) or "v5" (as transformers 5 saves)
    )
    dtype: str = "float32"
    shards: int = 1
    shape: tuple[int, int] = (2, 40)  # B, T
    prompt_len: int = 12
    new_tokens: int = 24
    bias: tuple[float, float] = (-0.1, 0.1)  # range of e_score_correction_bias
    gain: dict[str, float] = field(default_factory=dict)  # name part -> factor on its init
    fp8: bool = False  # linear weights in e4m3, a scale per 128x128 block
    ue8m0: str | None = None  # with fp8: weights whose scales are powers of two, by name part


def hub_config(case: Case) -> Config:
    """config.json with the fields DeepSeek publishes (`rope_scaling`, `torch_dtype`)."""
    v3 = case.base["model_type"] != "deepseek_v2"  # Kimi-K2 says it is a DeepseekV3ForCausalLM
    name = "DeepseekV3" if v3 else "DeepseekV2"
    scaling = {k: v for k, v in case.rope.items() if k != "rope_theta"}
    hub = {
        "architectures": [name + "ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": f"configuration_deepseek.{name}Config",
            "AutoModel": f"modeling_deepseek.{name}Model",
            "AutoModelForCausalLM": f"modeling_deepseek.{name}ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "rope_scaling": {"type": "yarn", **scaling} if scaling else None,
        "rope_theta": case.rope["rope_theta"],
        "scoring_func": "sigmoid" if v3 else "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc" if v3 else "greedy",
        "torch_dtype": case.dtype,
        "transformers_version": "4.33.1",
        "use_cache": True,
    }
    return dict(sorted((hub | case.base).items()))


def yarn(
    length: int,
    *,
    theta: float = 1e4,
    factor: float = 40,
    beta_fast: float = 32,
    m: tuple[float, float] = (1.0, 1.0),
) -> Config:
    """The YaRN fields of DeepSeek's configs, with another original length."""
    return {
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": m[0],
        "mscale_all_dim": m[1],
    }


V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 640,
    "num_nextn_predict_layers": 0,
}
V2 = {k: v for k, v in V3.items() if k != "num_nextn_predict_layers"} | {
    "model_type": "deepseek_v2",
    "hidden_size": 56,
    "moe_intermediate_size": 14,
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
MOONLIGHT_LIKE = {
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
V2_GROUPS = {
    "hidden_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "q_lora_rank": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
KIMI = {
    "model_type": "kimi_k2",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 24,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 1024,
}
# Rotary rows lie within a block of 128, as in real models: 64..127 of each query head of 128
FP8_ALIGNED = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 3,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
# 144 rows of q_b, rotary ones at 24 h + 16..23: none of these ranges holds row 128
FP8_RAGGED = {
    "vocab_size": 80,
    "hidden_size": 136,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 6,
    "n_group": 3,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
}
# With a bias range this negative, score + bias < 0 inside kept groups: a 0.0 group mask would leak
LEAKY = {"num_experts_per_tok": 6}
CASES = [
    Case(name="v3_yarn", seed=1, base=V3, rope=yarn(16)),
    Case(
        name="v3_plain",
        seed=2,
        base=V3 | MOONLIGHT_LIKE,
        rope={"rope_theta": 5e4},
        style="v5",
        gain={"embed_tokens": 0.05, "kv_a_proj": 0.1},  # small activations make the two eps visible
    ),
    Case(name="v2lite", seed=3, base=V2, rope=yarn(16, m=(0.707, 0.707))),
    Case(
        name="v3_sharded_bf16",
        seed=4,
        base=V3 | LEAKY | {"qk_rope_head_dim": 16, "max_position_embeddings": 2560},
        rope=yarn(64),  # longer than the sequence: YaRN applies all the same
        dtype="bfloat16",
        shards=4,
        bias=(-0.6, 0.1),
    ),
    Case(
        name="v3_mtp",
        seed=5,
        base=V3
        | {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 4, "num_experts_per_tok": 3}
        | {"num_nextn_predict_layers": 3, "qk_rope_head_dim": 16, "max_position_embeddings": 40960},
        rope=yarn(1024, theta=100.0),  # a ramp with both ends inside the table, upper end past P/2
        dtype="bfloat16",
        bias=(-0.6, 0.1),
    ),
    Case(
        name="v2_groups",
        seed=6,
        base=V2 | V2_GROUPS,
        rope=yarn(16, m=(0.707, 0.707)),
        dtype="bfloat16",
        shape=(1, 40),
    ),
    Case(
        name="kimi",
        seed=7,
        base=V3 | KIMI,
        rope=yarn(16, theta=5e4, factor=32, beta_fast=1),
        dtype="bfloat16",
        shape=(1, 40),
    ),
    Case(
        name="fp8_aligned",
        seed=8,
        base=V3 | FP8_ALIGNED,
        rope=yarn(16),
        dtype="bfloat16",
        shape=(1, 24),
        prompt_len=8,
        new_tokens=16,
        fp8=True,
    ),
    Case(
        name="fp8_ragged",
        seed=9,
        base=V3 | FP8_RAGGED,
        rope=yarn(16),
        dtype="bfloat16",
        shards=3,  # a weight and its scales lie where chance puts them
        shape=(1, 24),
        prompt_len=8,
        new_tokens=16,
        fp8=True,
        ue8m0=".mlp.",
    ),
]


def random_case(seed: int, family: str) -> Case:
    """A tiny config of the family with sizes, ranks, groups, rope, files and MTP depth drawn."""
    rng = np.random.default_rng([seed, 1000])

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    v3 = family == "v3"
    heads, layers = pick(1, 2, 3, 4, 6), pick(1, 2, 3, 4, 5)
    grouped = v3 or pick(True, False)
    groups, size = (pick(1, 1, 2, 3, 4, 8), pick(2, 3, 4)) if grouped else (1, pick(4, 6, 8, 13))
    kept = int(rng.integers(1, groups + 1))
    top_k = int(rng.integers(1, min(kept * size, 8) + 1))
    base = {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "vocab_size": pick(97, 128, 200, 256),
        "hidden_size": heads * pick(12, 16, 20, 32),
        "intermediate_size": pick(40, 64, 96),
        "moe_intermediate_size": pick(8, 12, 24, 32),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": pick(None, 12, 24, 40) if v3 else pick(None, None, None, 24),
        "kv_lora_rank": pick(8, 16, 32, 48),
        "qk_nope_head_dim": pick(6, 8, 16, 24),
        "qk_rope_head_dim": pick(2, 4, 8, 16),
        "v_head_dim": pick(5, 8, 12, 20),
        "n_routed_experts": groups * size,
        "n_shared_experts": pick(1, 1, 2, 3),
        "num_experts_per_tok": top_k,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": v3 and pick(True, True, False),
        "routed_scaling_factor": pick(1.0, 1.5, 2.446, 2.5),
        "first_k_dense_replace": pick(0, 1, 1, layers, int(rng.integers(0, layers))),
        "rms_norm_eps": pick(1e-6, 1e-6, 1e-5),
        "max_position_embeddings": 4096,
    }
    if v3:
        base["num_nextn_predict_layers"] = pick(0, 0, 1, 2, 3)
    elif grouped:
        base["topk_method"] = "group_limited_greedy"
    theta = pick(100.0, 1e4, 5e4)
    rope: Config = {"rope_theta": theta}
    if pick(True, True, False):
        m = pick((1.0, 1.0), (1.0, 1.0), (0.707, 0.707), (1.0, 0.707))
        rope = yarn(pick(8, 16, 64, 256), theta=theta, beta_fast=pick(2, 8, 32), m=m)
        rope["factor"] = pick(2, 4, 32, 40)
    return Case(
        name=f"{family}-{seed}",
        seed=seed + 10_000,
        base=base,
        rope=rope,
        style=pick("hub", "hub", "v5"),
        dtype=pick("float32", "bfloat16"),
        shards=pick(1, 1, 2, 3, 5),
        shape=(pick(1, 2, 3), pick(17, 33, 48)),
        prompt_len=pick(1, 5, 12),
        new_tokens=pick(8, 24),
        bias=pick((-0.1, 0.1), (-0.6, 0.1)),
        gain={"embed_tokens": pick(0.3, 1.0), "kv_a_proj": pick(0.2, 1.0), "down_proj": 0.5},
    )
