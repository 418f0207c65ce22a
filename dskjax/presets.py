"""Configurations of the public models, and tiny ones for tests.

Values are those of the published `config.json` files (see each constructor); the tiny ones keep
every code path alive.
"""

import dataclasses
from collections.abc import Callable

from dskjax.config import MlaConfig, ModelConfig, MoeConfig, MtpConfig, RopeConfig, YarnConfig

_MLA_HEADS = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2_YARN = YarnConfig(
    factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
)


def _kimi_yarn(length: int) -> YarnConfig:
    return YarnConfig(
        factor=32.0,
        original_max_position_embeddings=length,
        beta_fast=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )


def deepseek_v3() -> ModelConfig:
    """DeepSeek-V3, R1 and V3.1: 671B parameters, 37B active, one MTP module of 11.6B beside
    them.
    """
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        mla=MlaConfig(q_lora_rank=1536, **_MLA_HEADS),
        moe=MoeConfig(
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
        ),
        first_k_dense_replace=3,
        rope=RopeConfig(
            yarn=YarnConfig(
                factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
            )
        ),
        mtp=MtpConfig(num_nextn_predict_layers=1),
        max_position_embeddings=163840,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2: 236B parameters, 21B active; softmax gate that limits the groups of experts, no
    MTP.
    """
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        num_hidden_layers=60,
        num_attention_heads=128,
        mla=MlaConfig(q_lora_rank=1536, **_MLA_HEADS),
        moe=MoeConfig(
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(yarn=_V2_YARN),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=(100001,),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: 15.7B parameters, 2.7B active; greedy softmax gate, no query compression,
    no MTP.
    """
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        num_hidden_layers=27,
        num_attention_heads=16,
        mla=MlaConfig(q_lora_rank=None, **_MLA_HEADS),
        moe=MoeConfig(
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            topk_method="greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(yarn=_V2_YARN),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_id=(100001,),
    )


def moonlight_16b_a3b() -> ModelConfig:
    """Moonlight-16B-A3B-Instruct: 16.0B parameters, 2.9B active; V3's architecture without query
    compression, groups, YaRN and MTP.
    """
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_hidden_layers=27,
        num_attention_heads=16,
        mla=MlaConfig(q_lora_rank=None, **_MLA_HEADS),
        moe=MoeConfig(
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            routed_scaling_factor=2.446,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(rope_theta=50000.0),
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        bos_token_id=163584,
        eos_token_id=(163586,),
    )


def kimi_k2() -> ModelConfig:
    """Kimi-K2: 1.03T parameters, 33B active; V3's architecture with half the heads and one group of
    384 experts, no MTP. K2-0905 and K2-Thinking differ in YaRN's factor (64) and in length.
    """
    return ModelConfig(
        model_type="kimi_k2",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=64,
        mla=MlaConfig(q_lora_rank=1536, **_MLA_HEADS),
        moe=MoeConfig(
            n_routed_experts=384,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            routed_scaling_factor=2.827,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(rope_theta=50000.0, yarn=_kimi_yarn(4096)),
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_id=(163585,),
    )


def tiny_v3() -> ModelConfig:
    """A V3 in miniature for tests: query compression, groups, shared expert, YaRN, one MTP
    module.
    """
    return ModelConfig(
        model_type="deepseek_v3",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        mla=MlaConfig(
            q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
        ),
        moe=MoeConfig(
            n_routed_experts=16,
            n_shared_experts=1,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(
            yarn=YarnConfig(
                factor=40.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0
            )
        ),
        mtp=MtpConfig(num_nextn_predict_layers=1),
        max_position_embeddings=640,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def tiny_v2lite() -> ModelConfig:
    """A V2-Lite in miniature for tests: plain queries, greedy softmax gate, two shared experts,
    YaRN.
    """
    return ModelConfig(
        model_type="deepseek_v2",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        mla=MlaConfig(
            q_lora_rank=None,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
        ),
        moe=MoeConfig(
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            topk_method="greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
        ),
        first_k_dense_replace=1,
        rope=RopeConfig(
            yarn=YarnConfig(
                factor=40.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707
            )
        ),
        max_position_embeddings=640,
        bos_token_id=0,
        eos_token_id=(1,),
    )


def tiny_v2() -> ModelConfig:
    """A V2 in miniature for tests: query compression, a softmax gate over groups, two shared
    experts, YaRN.
    """
    lite = tiny_v2lite()
    assert lite.moe is not None
    return dataclasses.replace(
        lite,
        mla=dataclasses.replace(lite.mla, q_lora_rank=24),
        moe=dataclasses.replace(
            lite.moe,
            n_routed_experts=16,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=4.0,
        ),
    )


def tiny_kimi() -> ModelConfig:
    """A Kimi-K2 in miniature for tests: V3's gate without groups, a YaRN ramp one channel wide, no
    MTP.
    """
    v3 = tiny_v3()
    assert v3.moe is not None
    return dataclasses.replace(
        v3,
        model_type="kimi_k2",
        num_hidden_layers=3,
        num_attention_heads=2,
        moe=dataclasses.replace(
            v3.moe, n_routed_experts=24, n_group=1, topk_group=1, routed_scaling_factor=2.827
        ),
        rope=RopeConfig(rope_theta=50000.0, yarn=_kimi_yarn(16)),
        mtp=MtpConfig(),
        max_position_embeddings=512,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek-v3": deepseek_v3,
    "deepseek-r1": deepseek_v3,
    "deepseek-v3.1": deepseek_v3,
    "deepseek-v2": deepseek_v2,
    "deepseek-v2-lite": deepseek_v2_lite,
    "moonlight-16b-a3b": moonlight_16b_a3b,
    "kimi-k2": kimi_k2,
    "tiny-v3": tiny_v3,
    "tiny-v2": tiny_v2,
    "tiny-v2lite": tiny_v2lite,
    "tiny-kimi": tiny_kimi,
}
"""Configurations by name. R1 and V3.1 have V3's architecture; their weights and chat templates
differ.
"""


def preset(name: str) -> ModelConfig:
    """The configuration of a named model.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
