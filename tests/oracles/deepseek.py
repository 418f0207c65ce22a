"""DeepSeek-V2, V2-Lite, V3 and Kimi-K2 with MTP in NumPy float64, from the reports and the
published weights' layout alone.

Imports nothing of ours. Weights are a flat dict under hub names in torch order, as a checkpoint
stores them: rotary channels are *interleaved*, and are rotated so. `config` is the parsed
`config.json` in the hub's spelling. Every function is one piece that a test may ask for alone.
"""

import math

import numpy as np

from tests.oracles import gates
from tests.oracles.attention import attend


def yarn_mscale(factor, a):
    """YaRN's attention factor m(f, a)."""
    return 1.0 if factor <= 1 else 0.1 * a * math.log(factor) + 1.0


def yarn_bounds(config):
    """(low, high): channels between which YaRN's ramp lies."""
    yarn, dim = config["rope_scaling"], config["qk_rope_head_dim"]

    def corr(turns):
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(config["rope_theta"]))

    low = max(math.floor(corr(yarn["beta_fast"])), 0)
    return low, min(math.ceil(corr(yarn["beta_slow"])), dim - 1)


def inverse_frequencies(config):
    """Radians per position of each channel pair, [P / 2]."""
    dim, out = config["qk_rope_head_dim"], []
    for j in range(dim // 2):
        speed = config["rope_theta"] ** (-2 * j / dim)
        if config["rope_scaling"]:
            low, high = yarn_bounds(config)
            ramp = min(max((j - low) / (high - low or 0.001), 0.0), 1.0)
            speed *= ramp / config["rope_scaling"]["factor"] + 1 - ramp
        out.append(speed)
    return np.array(out)


def softmax_scale(config):
    """(N + P)^-0.5, times m(f, mscale_all_dim)^2 under YaRN; cos and sin are not scaled."""
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    if config["rope_scaling"]:
        yarn = config["rope_scaling"]
        scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale


def rotate_interleaved(x, positions, config):
    """Rotates channel pairs (2j, 2j + 1) of x [T, ..., P]; the result stays interleaved."""
    angle = positions[:, None] * inverse_frequencies(config)
    turn = np.exp(1j * angle).reshape(len(positions), *(1,) * (x.ndim - 2), -1)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def mlp(w, name, x):
    """down(silu(gate x) * up x)."""
    gate, up = x @ w[name + "gate_proj.weight"].T, x @ w[name + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w[name + "down_proj.weight"].T


def attention_parts(w, name, x, positions, config):
    """(q_nope [T,H,N], q_rope [T,H,P], latent [T,C], k_rope [T,P]), rotated and normed."""
    heads, n = config["num_attention_heads"], config["qk_nope_head_dim"]
    eps = config.get("mla_norm_eps", 1e-6)
    if config["q_lora_rank"] is None:
        q = x @ w[name + "q_proj.weight"].T
    else:
        q = x @ w[name + "q_a_proj.weight"].T
        q = rms_norm(q, w[name + "q_a_layernorm.weight"], eps) @ w[name + "q_b_proj.weight"].T
    q = q.reshape(len(x), heads, -1)
    ckv = x @ w[name + "kv_a_proj_with_mqa.weight"].T
    latent, k_rope = ckv[:, : config["kv_lora_rank"]], ckv[:, config["kv_lora_rank"] :]
    latent = rms_norm(latent, w[name + "kv_a_layernorm.weight"], eps)
    q_rope = rotate_interleaved(q[..., n:], positions, config)
    return q[..., :n], q_rope, latent, rotate_interleaved(k_rope, positions, config)


def attention(w, name, x, config):
    """Causal MLA of one sequence x [T, D], expanded per head."""
    positions = np.arange(len(x))
    q_nope, q_rope, latent, k_rope = attention_parts(w, name, x, positions, config)
    n, v = config["qk_nope_head_dim"], config["v_head_dim"]
    kv = (latent @ w[name + "kv_b_proj.weight"].T).reshape(len(x), -1, n + v)
    out, scale = np.zeros((len(x), kv.shape[1], v)), softmax_scale(config)
    for t in range(len(x)):
        for h in range(kv.shape[1]):
            scores = kv[: t + 1, h, :n] @ q_nope[t, h] + k_rope[: t + 1] @ q_rope[t, h]
            out[t, h], _ = attend(scale * scores, kv[: t + 1, h, n:])
    return out.reshape(len(x), -1) @ w[name + "o_proj.weight"].T


def gate(w, name, x, config):
    """(weights, experts) [T, K] of the gate of a layer."""
    v3, greedy = config["topk_method"] == "noaux_tc", config["topk_method"] == "greedy"
    return gates.gate(
        x @ w[name + "gate.weight"].T,
        w[name + "gate.e_score_correction_bias"] if v3 else None,
        top_k=config["num_experts_per_tok"],
        scoring_func=config["scoring_func"],
        n_group=1 if greedy else config["n_group"],
        topk_group=1 if greedy else config["topk_group"],
        norm_topk_prob=config["norm_topk_prob"],
        routed_scaling_factor=config["routed_scaling_factor"],
    )


def moe(w, name, x, config):
    """(output, experts): every chosen expert token by token, plus the shared ones, unscaled."""
    weights, experts = gate(w, name, x, config)
    out = mlp(w, name + "shared_experts.", x) if config["n_shared_experts"] else np.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(weights[t], experts[t], strict=True):
            out[t] += weight * mlp(w, f"{name}experts.{e}.", x[t : t + 1])[0]
    return out, experts


def block(w, name, x, config, dense):
    """(residual stream after one layer, chosen experts or None)."""
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, w[name + "input_layernorm.weight"], eps)
    x = x + attention(w, name + "self_attn.", normed, config)
    normed = rms_norm(x, w[name + "post_attention_layernorm.weight"], eps)
    if dense:
        return x + mlp(w, name + "mlp.", normed), None
    out, experts = moe(w, name + "mlp.", normed, config)
    return x + out, experts


def trunk(w, ids, config):
    """One sequence: (final hidden [T, D], residual stream of each layer, experts of MoE layers)."""
    x, layers, chosen = w["model.embed_tokens.weight"][ids], [], []
    for i in range(config["num_hidden_layers"]):
        dense = i < config["first_k_dense_replace"]
        x, experts = block(w, f"model.layers.{i}.", x, config, dense)
        layers.append(x)
        if not dense:
            chosen.append(experts)
    return rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]), layers, chosen


def head(w, hidden):
    """Logits."""
    return hidden @ w["lm_head.weight"].T


def mtp(w, ids, hidden, config, depths):
    """h^1..h^depths of one sequence; depth k has T - k rows and row i predicts ids[i + k + 1]."""
    out, eps, h = [], config["rms_norm_eps"], hidden
    for k in range(1, depths + 1):
        name = f"model.layers.{config['num_hidden_layers'] + k - 1}."
        embedded = w["model.embed_tokens.weight"][ids[k:]]
        pair = (
            rms_norm(embedded, w[name + "enorm.weight"], eps),
            rms_norm(h[: len(embedded)], w[name + "hnorm.weight"], eps),
        )
        x = np.concatenate(pair, axis=-1) @ w[name + "eh_proj.weight"].T
        x, _ = block(w, name, x, config, dense=False)
        h = rms_norm(x, w[name + "shared_head.norm.weight"], eps)
        out.append(h)
    return out
