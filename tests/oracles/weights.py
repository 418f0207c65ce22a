"""Random tiny checkpoints in NumPy, and the same weights in the stacked layout of `dskjax`.

Imports nothing of ours: the layout (names, stacking, order of rotary rows) is written down here a
second time, on purpose.
"""

import numpy as np


def shapes(config):
    """(hub name, torch-order shape) of every tensor of a model, MTP modules last."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    qk = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rank, q_rank, v = config["kv_lora_rank"], config["q_lora_rank"], config["v_head_dim"]

    def mlp(name, width):
        yield name + "gate_proj.weight", (width, d)
        yield name + "up_proj.weight", (width, d)
        yield name + "down_proj.weight", (d, width)

    def layer(name, dense):
        yield name + "input_layernorm.weight", (d,)
        yield name + "post_attention_layernorm.weight", (d,)
        attn = name + "self_attn."
        if q_rank is None:
            yield attn + "q_proj.weight", (heads * qk, d)
        else:
            yield attn + "q_a_proj.weight", (q_rank, d)
            yield attn + "q_a_layernorm.weight", (q_rank,)
            yield attn + "q_b_proj.weight", (heads * qk, q_rank)
        yield attn + "kv_a_proj_with_mqa.weight", (rank + config["qk_rope_head_dim"], d)
        yield attn + "kv_a_layernorm.weight", (rank,)
        yield attn + "kv_b_proj.weight", (heads * (config["qk_nope_head_dim"] + v), rank)
        yield attn + "o_proj.weight", (d, heads * v)
        if dense:
            yield from mlp(name + "mlp.", config["intermediate_size"])
            return
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        yield name + "mlp.gate.weight", (experts, d)
        if config["topk_method"] == "noaux_tc":
            yield name + "mlp.gate.e_score_correction_bias", (experts,)
        for e in range(experts):
            yield from mlp(f"{name}mlp.experts.{e}.", width)
        if config["n_shared_experts"]:
            yield from mlp(name + "mlp.shared_experts.", config["n_shared_experts"] * width)

    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (config["vocab_size"], d)
    layers = config["num_hidden_layers"]
    for i in range(layers):
        yield from layer(f"model.layers.{i}.", i < config["first_k_dense_replace"])
    for i in range(layers, layers + config["num_nextn_predict_layers"]):
        name = f"model.layers.{i}."
        for part in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{name}{part}.weight", (d,)
        yield name + "eh_proj.weight", (d, 2 * d)
        yield from layer(name, dense=False)


def random_weights(config, seed=0):
    """float64 weights that are exact in float32; norms far from 1, biases of both signs."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(config):
        if name.endswith("e_score_correction_bias"):
            value = rng.uniform(-0.3, 0.1, shape)
        elif len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("embed_tokens.weight"):
            value = rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) * shape[1] ** -0.5
        out[name] = np.float64(np.float32(value))
    return out


def half_split_rows(weight, heads, before, rope):
    """Reorders the `rope` rows after `before` rows of each head: 0, 2, 4, ... then 1, 3, 5, ..."""
    per_head = weight.reshape(heads, before + rope, -1).copy()
    rows = per_head[:, before:]
    per_head[:, before:] = np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1)
    return per_head.reshape(weight.shape)


def attention(w, name, config, reorder=True):
    """Weights of one attention layer; `reorder=False` forgets the rotary order."""
    heads = config["num_attention_heads"]
    names = ("q_proj",) if config["q_lora_rank"] is None else ("q_a_proj", "q_b_proj")
    out = {
        part: w[f"{name}{part}.weight"]
        for part in (*names, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    norms = ("kv_a_layernorm",) if len(names) == 1 else ("q_a_layernorm", "kv_a_layernorm")
    out |= {part: {"weight": w[f"{name}{part}.weight"]} for part in norms}
    if reorder:
        rope = config["qk_rope_head_dim"]
        out[names[-1]] = half_split_rows(out[names[-1]], heads, config["qk_nope_head_dim"], rope)
        kv_a = out["kv_a_proj_with_mqa"]
        out["kv_a_proj_with_mqa"] = half_split_rows(kv_a, 1, config["kv_lora_rank"], rope)
    return out


def swiglu(w, name):
    """gate and up as one array [2, F, D], and down."""
    pair = [w[f"{name}{part}_proj.weight"] for part in ("gate", "up")]
    return {"gate_up_proj": np.stack(pair), "down_proj": w[name + "down_proj.weight"]}


def moe(w, name, config):
    """Gate, experts stacked on a first axis, shared experts."""
    gate = {"weight": w[name + "gate.weight"]}
    if config["topk_method"] == "noaux_tc":
        gate["e_score_correction_bias"] = w[name + "gate.e_score_correction_bias"]
    experts = [swiglu(w, f"{name}experts.{e}.") for e in range(config["n_routed_experts"])]
    out = {"gate": gate, "experts": stack(experts)}
    if config["n_shared_experts"]:
        out["shared_experts"] = swiglu(w, name + "shared_experts.")
    return out


def block(w, name, config, dense, reorder=True):
    """One decoder layer."""
    return {
        "input_layernorm": {"weight": w[name + "input_layernorm.weight"]},
        "self_attn": attention(w, name + "self_attn.", config, reorder),
        "post_attention_layernorm": {"weight": w[name + "post_attention_layernorm.weight"]},
        "mlp": swiglu(w, name + "mlp.") if dense else moe(w, name + "mlp.", config),
    }


def stack(trees):
    """Nested dicts of one structure -> one, with a new first axis."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: stack([tree[key] for tree in trees]) for key in first}
    return np.stack(trees)


def stacked(w, config, reorder=True):
    """The whole model as `dskjax` holds it, float32."""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    out = {
        "embed_tokens": {"weight": w["model.embed_tokens.weight"]},
        "norm": {"weight": w["model.norm.weight"]},
        "lm_head": {"weight": w["lm_head.weight"]},
    }
    for key, rows, is_dense in (
        ("dense_layers", range(dense), True),
        ("moe_layers", range(dense, layers), False),
    ):
        if rows:
            trees = [block(w, f"model.layers.{i}.", config, is_dense, reorder) for i in rows]
            out[key] = stack(trees)
    modules = []
    for i in range(layers, layers + config["num_nextn_predict_layers"]):
        name = f"model.layers.{i}."
        module = {part: {"weight": w[f"{name}{part}.weight"]} for part in ("enorm", "hnorm")}
        module["norm"] = {"weight": w[name + "shared_head.norm.weight"]}
        module["eh_proj"] = w[name + "eh_proj.weight"]
        module["block"] = block(w, name, config, dense=False, reorder=reorder)
        modules.append(module)
    if modules:
        out["mtp_layers"] = stack(modules)
    return to_float32(out)


def to_float32(tree):
    """Nested dict with float32 leaves."""
    if isinstance(tree, dict):
        return {key: to_float32(value) for key, value in tree.items()}
    return np.float32(tree)
