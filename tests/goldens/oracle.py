"""A second opinion on the goldens: DeepSeek-V2/V3 with its MTP chain in float64 NumPy.

It follows the reports line by line, shares no code with Hugging Face or dskjax, reads a checkpoint
as a flat dict of float arrays under hub names, and can be told to make one named mistake of
`MISTAKES`. `scripts/make_goldens.py` uses it to bound the rounding error inside each golden and to
prove that every mistake visibly moves the logits of some golden. No cache and no speed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]

# name -> what it gets wrong; 10.n: pitfall n of tests/model/test_pitfalls.py, else the rule's own
# number
MISTAKES = {
    "rope_half_split": "10.1: rotates (j, j+P/2) on raw weights instead of (2j, 2j+1)",
    "rope_before_nope": "1.4: splits q as [rope | nope]",
    "kv_a_rope_first": "1.4: splits kv_a as [rope | latent]",
    "kv_a_norm_skipped": "1.4: uses the latent before its norm",
    "scale_no_mscale": "10.2: softmax scale without mscale^2",
    "scale_mscale_once": "10.2: softmax scale with mscale^1",
    "scale_in_rope": "10.2: cos/sin multiplied by mscale as well",
    "scale_latent_dim": "1.5: softmax scale from latent + rope width",
    "yarn_dropped": "1.7: plain inverse frequencies (no YaRN, or only past the original length)",
    "yarn_not_truncated": "1.7: ramp ends not floored and ceiled",
    "yarn_clamp_half": "1.7: ramp end clamped to P/2 - 1 instead of P - 1",
    "yarn_wrong_length": "1.7: max_position_embeddings in place of the original length",
    "kv_b_blocks": "10.3: kv_b read as [all heads k | all heads v]",
    "kv_b_value_first": "10.3: kv_b read per head as [v | k]",
    "gate_biased_weights": "10.4: expert weights taken from score + bias",
    "gate_zero_mask": "10.4: dropped groups masked with 0.0 instead of -inf",
    "gate_no_bias": "1.8: selection ignores e_score_correction_bias",
    "gate_no_groups": "1.8: top-k over all groups",
    "gate_group_max": "1.8: group score = max instead of the sum of the two best",
    "gate_group_sum": "1.8: V2's group score = sum of the two best instead of the max",
    "gate_renorm_flipped": "1.8: norm_topk_prob inverted",
    "gate_no_factor": "1.8: routed_scaling_factor dropped",
    "gate_other_score": "1.8: softmax and sigmoid exchanged",
    "shared_scaled": "10.5: shared expert multiplied by routed_scaling_factor",
    "shared_first_only": "1.2: n_shared_experts = 2 read as one expert of half the width",
    "silu_on_up": "1.3: silu on up_proj instead of gate_proj",
    "mla_eps_from_config": "1.3: q_a/kv_a norms use rms_norm_eps instead of 1e-6",
    "block_eps_default": "1.3: block norms use 1e-6 instead of rms_norm_eps",
    "mtp_hidden_first": "10.6: eh_proj fed [hidden | embedding]",
    "mtp_norms_swapped": "2.1: enorm on the hidden state, hnorm on the embedding",
    "mtp_trunk_pre_norm": "10.7: depth 1 fed the trunk state before model.norm",
    "mtp_chain_pre_norm": "10.7: depth k+1 fed the state before shared_head.norm",
    "mtp_trunk_norm": "2.1: model.norm instead of the module's own shared_head.norm",
    "mtp_trunk_hidden": "2.3 D: every depth fed the trunk state",
    "mtp_token_late": "2.1: depth k fed t[i+k-1] instead of t[i+k]",
    "mtp_one_module": "2.3 C: module 1 reused at every depth",
}


def worst_row(got: np.ndarray, want: np.ndarray) -> float:
    """Largest relative error of one row (last axis), in the 2-norm."""
    error = np.linalg.norm(got.astype(np.float64) - want, axis=-1)
    return float((error / np.linalg.norm(want, axis=-1)).max())


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error of the whole array in the 2-norm."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def rope_parameters(cfg: dict[str, Any]) -> dict[str, Any]:
    """The rope settings of either config style as one dict with `rope_theta` and `rope_type`."""
    rope = dict(cfg.get("rope_parameters") or cfg.get("rope_scaling") or {})
    rope.setdefault("rope_theta", cfg.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope


def mscale(factor: float, a: float) -> float:
    """YaRN's m(f, a) = 0.1 a ln f + 1, or 1 when nothing is stretched."""
    return 0.1 * a * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(cfg: dict[str, Any], mistake: str | None = None) -> Array:
    """inv_freq [P/2], with YaRN."""
    rope, dim = rope_parameters(cfg), cfg["qk_rope_head_dim"]
    plain = rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    if rope["rope_type"] != "yarn" or mistake == "yarn_dropped":
        return plain
    length = rope["original_max_position_embeddings"]
    if mistake == "yarn_wrong_length":
        length = cfg["max_position_embeddings"]

    def correction(rotations: float) -> float:
        return (
            dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(rope["rope_theta"]))
        )

    low, high = correction(rope["beta_fast"]), correction(rope["beta_slow"])
    if mistake != "yarn_not_truncated":
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim // 2 - 1 if mistake == "yarn_clamp_half" else dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    return plain * (ramp / rope["factor"] + (1 - ramp))


def rope_multiplier(cfg: dict[str, Any]) -> float:
    """Factor on cos and sin: m(mscale)/m(mscale_all_dim), or HF's m(1) unless both are set."""
    rope = rope_parameters(cfg)
    if rope["rope_type"] != "yarn":
        return 1.0
    top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
    if top and bottom:
        return mscale(rope["factor"], top) / mscale(rope["factor"], bottom)
    return mscale(rope["factor"], 1.0)


def softmax_scale(cfg: dict[str, Any], power: int = 2) -> float:
    """(N + P)^-0.5 * m(f, mscale_all_dim)^2."""
    rope = rope_parameters(cfg)
    scale = (cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]) ** -0.5
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= mscale(rope["factor"], rope["mscale_all_dim"]) ** power
    return scale


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def groups_of(cfg: dict[str, Any]) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may use."""
    if cfg["model_type"] == "deepseek_v2" and cfg.get("topk_method") != "group_limited_greedy":
        return 1, 1
    return cfg["n_group"], cfg["topk_group"]


class Oracle:
    """One checkpoint (flat hub-named weights, its config.json), read with at most one mistake."""

    def __init__(self, weights: Weights, cfg: dict[str, Any], mistake: str | None = None):
        if mistake is not None and mistake not in MISTAKES:
            raise ValueError(f"{mistake=} is not one of {sorted(MISTAKES)}")
        self.weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
        self.cfg, self.mistake = cfg, mistake
        self.v3 = cfg["model_type"] != "deepseek_v2"
        self.eps = 1e-6 if mistake == "block_eps_default" else cfg["rms_norm_eps"]
        self.mla_eps = cfg["rms_norm_eps"] if mistake == "mla_eps_from_config" else 1e-6

    def linear(self, x: Array, name: str) -> Array:
        """x @ W^T for the torch-ordered weight `name`."""
        return x @ self.weights[name + ".weight"].T

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm with the config's eps."""
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def rope(self, x: Array, angle_tp: Array) -> Array:
        """Rotates x [.., T, P]: interleaved pairs, in place (not de-interleaved)."""
        factor = rope_multiplier(self.cfg)
        if self.mistake == "scale_in_rope":
            factor *= softmax_scale(self.cfg, 1) / softmax_scale(self.cfg, 0)
        cos, sin = np.cos(angle_tp) * factor, np.sin(angle_tp) * factor
        half = x.shape[-1] // 2
        split = self.mistake == "rope_half_split"
        a, b = (x[..., :half], x[..., half:]) if split else (x[..., 0::2], x[..., 1::2])
        a, b = a * cos - b * sin, b * cos + a * sin
        return np.concatenate([a, b], -1) if split else np.stack([a, b], -1).reshape(x.shape)

    def attention(self, x: Array, name: str, positions: Array) -> Array:
        """Causal MLA in the expanded form; x [B, T, D]."""
        cfg, bad = self.cfg, self.mistake
        b, t, _ = x.shape
        h, n, p = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
        c, v = cfg["kv_lora_rank"], cfg["v_head_dim"]

        if cfg.get("q_lora_rank") is None:
            q = self.linear(x, name + "q_proj")
        else:
            q = self.linear(x, name + "q_a_proj")
            q = rms_norm(q, self.weights[name + "q_a_layernorm.weight"], self.mla_eps)
            q = self.linear(q, name + "q_b_proj")
        q = q.reshape(b, t, h, n + p).transpose(0, 2, 1, 3)
        q_nope, q_rope = q[..., :n], q[..., n:]
        if bad == "rope_before_nope":
            q_rope, q_nope = q[..., :p], q[..., p:]

        kv = self.linear(x, name + "kv_a_proj_with_mqa")
        latent, k_rope = kv[..., :c], kv[..., c:]
        if bad == "kv_a_rope_first":
            k_rope, latent = kv[..., :p], kv[..., p:]
        if bad != "kv_a_norm_skipped":
            latent = rms_norm(latent, self.weights[name + "kv_a_layernorm.weight"], self.mla_eps)
        up = self.linear(latent, name + "kv_b_proj")
        if bad == "kv_b_blocks":
            k_nope = up[..., : h * n].reshape(b, t, h, n)
            value = up[..., h * n :].reshape(b, t, h, v)
        else:
            up = up.reshape(b, t, h, n + v)
            k_nope, value = up[..., :n], up[..., n:]
            if bad == "kv_b_value_first":
                value, k_nope = up[..., :v], up[..., v:]
        k_nope, value = k_nope.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

        angle = positions[:, None] * inverse_frequencies(cfg, bad)
        q_rope, k_rope = self.rope(q_rope, angle), self.rope(k_rope, angle)
        scale = softmax_scale(cfg, {"scale_no_mscale": 0, "scale_mscale_once": 1}.get(bad or "", 2))
        if bad == "scale_latent_dim":
            scale *= ((n + p) / (c + p)) ** 0.5
        score = np.einsum("bhtn,bhsn->bhts", q_nope, k_nope)
        score = (score + np.einsum("bhtp,bsp->bhts", q_rope, k_rope)) * scale
        score = np.where(np.tril(np.ones((t, t), bool)), score, -np.inf)
        out = (softmax(score) @ value).transpose(0, 2, 1, 3).reshape(b, t, h * v)
        return self.linear(out, name + "o_proj")

    def route(self, x: Array, name: str) -> tuple[Array, Array, Array]:
        """Expert ids ascending [.., K], their weights, and the margin of this choice [..]."""
        cfg, bad = self.cfg, self.mistake
        k, factor = cfg["num_experts_per_tok"], cfg["routed_scaling_factor"]
        logits = self.linear(x, name + "gate")
        use_sigmoid = self.v3 != (bad == "gate_other_score")
        score = 1 / (1 + np.exp(-logits)) if use_sigmoid else softmax(logits)
        choice, margin = score, np.full(score.shape[:-1], np.inf)
        if self.v3 and bad != "gate_no_bias":
            choice = score + self.weights[name + "gate.e_score_correction_bias"]
        g, keep = groups_of(cfg)
        if keep < g and bad != "gate_no_groups":
            groups = choice.reshape(*choice.shape[:-1], g, -1)
            best = 2 if self.v3 != (bad in ("gate_group_max", "gate_group_sum")) else 1
            group_score = np.sort(groups, -1)[..., -best:].sum(-1)
            ranked = np.sort(group_score, -1)
            margin = ranked[..., g - keep] - ranked[..., g - keep - 1]
            kept = group_score >= ranked[..., g - keep, None]
            masked = -np.inf if self.v3 and bad != "gate_zero_mask" else 0.0
            choice = np.where(kept[..., None], groups, masked).reshape(choice.shape)
        order = np.argsort(-choice, -1, kind="stable")
        ranked = np.take_along_axis(choice, order, -1)
        if k < cfg["n_routed_experts"]:
            margin = np.minimum(margin, ranked[..., k - 1] - ranked[..., k])
        ids = np.sort(order[..., :k], -1)
        weights = np.take_along_axis(choice if bad == "gate_biased_weights" else score, ids, -1)
        # V2 in Hugging Face never renormalizes, whatever norm_topk_prob says
        if (self.v3 and cfg["norm_topk_prob"]) != (bad == "gate_renorm_flipped"):
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return ids, weights * (1.0 if bad == "gate_no_factor" else factor), margin

    def mlp(self, x: Array, name: str, width: int | None = None) -> Array:
        """down(silu(gate x) * up x), optionally only the first `width` hidden units."""
        gate, up = self.linear(x, name + "gate_proj"), self.linear(x, name + "up_proj")
        if self.mistake == "silu_on_up":
            gate, up = up, gate
        return (silu(gate) * up)[..., :width] @ self.weights[name + "down_proj.weight"][:, :width].T

    def moe(self, x: Array, name: str) -> tuple[Array, dict[str, Array]]:
        """Routed experts plus the shared one, and what the router chose."""
        ids, weights, margin = self.route(x, name)
        out = np.zeros_like(x)
        for e in range(self.cfg["n_routed_experts"]):
            weight = (weights * (ids == e)).sum(-1)
            rows = (ids == e).any(-1)
            out[rows] += weight[rows][:, None] * self.mlp(x[rows], f"{name}experts.{e}.")
        half = self.cfg["moe_intermediate_size"] if self.mistake == "shared_first_only" else None
        shared = self.mlp(x, name + "shared_experts.", half)
        scale = self.cfg["routed_scaling_factor"] if self.mistake == "shared_scaled" else 1.0
        return out + scale * shared, {"experts": ids, "gate_weights": weights, "margin": margin}

    def block(
        self, x: Array, name: str, positions: Array, dense: bool
    ) -> tuple[Array, dict[str, Array]]:
        """One decoder layer."""
        attended = self.attention(
            self.norm(x, name + "input_layernorm"), name + "self_attn.", positions
        )
        x = x + attended
        y = self.norm(x, name + "post_attention_layernorm")
        if dense:
            return x + self.mlp(y, name + "mlp."), {}
        y, chosen = self.moe(y, name + "mlp.")
        return x + y, chosen

    def trunk(self, ids: Array) -> dict[str, Array]:
        """`embed`, `layer_i`, `final`, `logits`, and `experts_i`, `gate_weights_i`, `margin_i`."""
        x = self.weights["model.embed_tokens.weight"][ids]
        out, positions = {"embed": x}, np.arange(ids.shape[1])
        for i in range(self.cfg["num_hidden_layers"]):
            dense = i < self.cfg["first_k_dense_replace"]
            x, chosen = self.block(x, f"model.layers.{i}.", positions, dense)
            out[f"layer_{i}"] = x
            out |= {f"{key}_{i}": value for key, value in chosen.items()}
        out["final"] = self.norm(x, "model.norm")
        out["logits"] = self.linear(out["final"], "lm_head")
        return out

    def mtp(self, ids: Array, trunk: dict[str, Array], depth: int) -> dict[str, Array]:
        """Teacher-forced MTP chain: `mtp_logits_k`, `mtp_hidden_k` [B, T-k, ..]."""
        bad, last = self.mistake, self.cfg["num_hidden_layers"]
        start = trunk[f"layer_{last - 1}"] if bad == "mtp_trunk_pre_norm" else trunk["final"]
        embed, state, out = self.weights["model.embed_tokens.weight"], start, {}
        for k in range(1, depth + 1):
            name = f"model.layers.{last + (0 if bad == 'mtp_one_module' else k - 1)}."
            anchors = ids.shape[1] - k
            shift = k - 1 if bad == "mtp_token_late" else k
            token = embed[ids[:, shift : shift + anchors]]
            hidden = (start if bad == "mtp_trunk_hidden" else state)[:, :anchors]
            enorm, hnorm = ("hnorm", "enorm") if bad == "mtp_norms_swapped" else ("enorm", "hnorm")
            pair = [self.norm(token, name + enorm), self.norm(hidden, name + hnorm)]
            x = np.concatenate(pair[::-1] if bad == "mtp_hidden_first" else pair, -1)
            x = self.linear(x, name + "eh_proj")
            x, chosen = self.block(x, name, np.arange(anchors), dense=False)
            post = self.norm(
                x, "model.norm" if bad == "mtp_trunk_norm" else name + "shared_head.norm"
            )
            state = x if bad == "mtp_chain_pre_norm" else post
            out[f"mtp_hidden_{k}"] = post
            out[f"mtp_logits_{k}"] = self.linear(post, "lm_head")
            out |= {f"mtp_{key}_{k}": value for key, value in chosen.items()}
        return out

    def run(self, ids: Array) -> dict[str, Array]:
        """Trunk and, if the checkpoint declares them, all MTP depths."""
        trunk = self.trunk(ids)
        return trunk | self.mtp(ids, trunk, self.cfg.get("num_nextn_predict_layers") or 0)


def applicable(cfg: dict[str, Any]) -> list[str]:
    """The mistakes that can change anything under this config."""
    v3, yarn = cfg["model_type"] != "deepseek_v2", rope_parameters(cfg)["rope_type"] == "yarn"
    depth = cfg.get("num_nextn_predict_layers") or 0
    scaled = yarn and bool(rope_parameters(cfg).get("mscale_all_dim"))
    moe = cfg["first_k_dense_replace"] < cfg["num_hidden_layers"] or depth > 0
    groups, kept = groups_of(cfg)
    shrunk = cfg["kv_lora_rank"] != cfg["qk_nope_head_dim"]

    def can(name: str) -> bool:
        if name.startswith(("gate_", "shared_")) and not moe:
            return False
        if name.startswith("mtp_"):
            return depth > (
                1 if name in ("mtp_chain_pre_norm", "mtp_trunk_hidden", "mtp_one_module") else 0
            )
        if name == "gate_no_groups":
            return kept < groups
        if name in ("gate_zero_mask", "gate_group_max"):
            return v3 and kept < groups
        if name == "gate_group_sum":
            return not v3 and kept < groups
        if name in ("gate_biased_weights", "gate_no_bias"):
            return v3
        if name in ("gate_no_factor", "shared_scaled"):
            return cfg["routed_scaling_factor"] != 1
        if name in ("scale_no_mscale", "scale_mscale_once", "scale_in_rope"):
            return scaled
        if name in ("mla_eps_from_config", "block_eps_default"):
            return cfg["rms_norm_eps"] != 1e-6
        return {
            "yarn_dropped": yarn,
            "yarn_not_truncated": yarn,
            "yarn_clamp_half": yarn,
            "yarn_wrong_length": yarn,
            "shared_first_only": cfg["n_shared_experts"] > 1,
            "scale_latent_dim": shrunk,
            "kv_b_blocks": cfg["num_attention_heads"] > 1,
        }.get(name, True)

    return [name for name in MISTAKES if can(name)]
