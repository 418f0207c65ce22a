"""Names, shapes and random values of a tiny DeepSeek checkpoint's tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tests.goldens.cases import Case, Config


def tensor_shapes(cfg: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(hub name, torch-order shape) of every tensor, trunk then MTP modules."""
    h, v = cfg["hidden_size"], cfg["vocab_size"]
    heads, qk = cfg["num_attention_heads"], cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]
    rank, q_rank, width = cfg["kv_lora_rank"], cfg.get("q_lora_rank"), cfg["moe_intermediate_size"]

    def mlp(name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield name + "gate_proj.weight", (inner, h)
        yield name + "up_proj.weight", (inner, h)
        yield name + "down_proj.weight", (h, inner)

    def layer(i: int, dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        p, a, m = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        if q_rank is None:
            yield a + "q_proj.weight", (heads * qk, h)
        else:
            yield a + "q_a_proj.weight", (q_rank, h)
            yield a + "q_a_layernorm.weight", (q_rank,)
            yield a + "q_b_proj.weight", (heads * qk, q_rank)
        yield a + "kv_a_proj_with_mqa.weight", (rank + cfg["qk_rope_head_dim"], h)
        yield a + "kv_a_layernorm.weight", (rank,)
        yield a + "kv_b_proj.weight", (heads * (cfg["qk_nope_head_dim"] + cfg["v_head_dim"]), rank)
        yield a + "o_proj.weight", (h, heads * cfg["v_head_dim"])
        if dense:
            yield from mlp(m, cfg["intermediate_size"])
            return
        yield m + "gate.weight", (cfg["n_routed_experts"], h)
        if cfg["model_type"] != "deepseek_v2":
            yield m + "gate.e_score_correction_bias", (cfg["n_routed_experts"],)
        for e in range(cfg["n_routed_experts"]):
            yield from mlp(f"{m}experts.{e}.", width)
        yield from mlp(m + "shared_experts.", width * cfg["n_shared_experts"])

    yield "model.embed_tokens.weight", (v, h)
    layers = cfg["num_hidden_layers"]
    for i in range(layers):
        yield from layer(i, i < cfg["first_k_dense_replace"])
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (v, h)
    for i in range(layers, layers + (cfg.get("num_nextn_predict_layers") or 0)):
        p = f"model.layers.{i}."
        yield p + "embed_tokens.weight", (v, h)
        yield p + "enorm.weight", (h,)
        yield p + "hnorm.weight", (h,)
        yield p + "eh_proj.weight", (h, 2 * h)
        yield from layer(i, dense=False)
        yield p + "shared_head.norm.weight", (h,)
        yield p + "shared_head.head.weight", (v, h)


def draw_weights(case: Case, cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 weights so loud that no part of the model hides behind the residual stream."""
    out: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(cfg):
        if name.endswith("e_score_correction_bias"):
            w = rng.uniform(*case.bias, shape)
        elif len(shape) == 1:
            w = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("embed_tokens.weight"):
            w = rng.standard_normal(shape)
        else:
            spread = 3.0 if "lm_head" in name else 1.5 if ".gate.weight" in name else 1.0
            w = rng.standard_normal(shape) * spread / math.sqrt(shape[1])
        for part, factor in case.gain.items():
            w = w * factor if part in name else w
        out[name] = w.astype(np.float32)
    for name in out:  # MTP modules carry physical copies of the trunk's embedding and head
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            out[name] = out["model.embed_tokens.weight"].copy()
        if name.endswith("shared_head.head.weight"):
            out[name] = out["lm_head.weight"].copy()
    return out
