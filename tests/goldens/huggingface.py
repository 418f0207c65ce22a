"""Runs transformers' DeepSeek models on a checkpoint folder and reads out what a golden holds.

Only `scripts/make_goldens.py` imports this, in its own environment: dskjax's has no torch.
Everything is float32 and eager (attention and experts), on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.goldens.cases import Config
from tests.goldens.oracle import worst_row

Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


def check_arrived(module: torch.nn.Module, prefix: str, weights: Tensors) -> None:
    """Every tensor under `prefix` sits in `module`, bit for bit; experts are fused there."""
    state = module.state_dict()
    for name, w in weights.items():
        if not name.startswith(prefix) or name.endswith("shared_head.head.weight"):
            continue
        key = name.removeprefix(prefix)
        if ".experts." in key:
            block, _, rest = key.partition(".experts.")
            expert, part, _ = rest.split(".")
            fused = state[
                f"{block}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
            ][int(expert)]
            half = fused.shape[0] // 2
            got = {"gate_proj": fused[:half], "up_proj": fused[half:], "down_proj": fused}[part]
        else:
            got = state[key]
        if not torch.equal(got.float(), w):
            raise AssertionError(f"{name} did not arrive in the Hugging Face model")


def load_model(folder: Path, cfg: Config, weights: Tensors) -> torch.nn.Module:
    """The Hugging Face model in float32, eager, with all trunk weights proven to be in it."""
    cls = getattr(transformers, cfg["architectures"][0])
    model, info = cls.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    layers = cfg["num_hidden_layers"]
    mtp = [f"model.layers.{layers + k}." for k in range(cfg.get("num_nextn_predict_layers") or 0)]
    unexpected = [n for n in info["unexpected_keys"] if not n.startswith(tuple(mtp))]
    if info["missing_keys"] or info["mismatched_keys"] or unexpected:
        raise AssertionError(
            f"{folder}: {info['missing_keys']=} {info['mismatched_keys']=} {unexpected=}"
        )
    trunk = {n: w for n, w in weights.items() if not n.startswith(tuple(mtp))} if mtp else weights
    check_arrived(model, "", trunk)
    return model.eval()


def hook_router(gate: torch.nn.Module, key: str, shape: tuple[int, ...], out: Arrays) -> Any:
    """Records `experts` (ascending) and their `gate_weights` under `key`, e.g. `mtp_*_1`."""

    def record(
        _module: Any, _args: Any, result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        _, weights, ids = result
        order = ids.argsort(-1)
        out[key.replace("*", "experts")] = ids.gather(1, order).reshape(*shape, -1).int().numpy()
        out[key.replace("*", "gate_weights")] = weights.gather(1, order).reshape(*shape, -1).numpy()

    return gate.register_forward_hook(record)


def run_trunk(model: Any, cfg: Config, ids: torch.Tensor) -> Arrays:
    """One full forward: embedding, residual stream after each block, final norm, logits, router."""
    out: Arrays = {}
    hooks = []

    def keep(module: torch.nn.Module, name: str) -> None:
        hooks.append(
            module.register_forward_hook(lambda _m, _a, y: out.__setitem__(name, y.numpy().copy()))
        )

    keep(model.model.embed_tokens, "embed")
    keep(model.model.norm, "final")
    for i, block in enumerate(model.model.layers):
        keep(block, f"layer_{i}")
        if i >= cfg["first_k_dense_replace"]:
            hooks.append(hook_router(block.mlp.gate, f"*_{i}", tuple(ids.shape), out))
    with torch.no_grad():
        out["logits"] = model(ids, use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    attention = model.model.layers[0].self_attn
    rotary = model.model.rotary_emb
    out["inv_freq"] = rotary.inv_freq.float().numpy()
    out["softmax_scale"] = np.float64(attention.scaling)
    out["rope_multiplier"] = np.float64(rotary.attention_scaling)
    out["mla_norm_eps"] = np.float64(attention.kv_a_layernorm.variance_epsilon)
    return out


def run_greedy(model: Any, ids: torch.Tensor, prompt_len: int, new_tokens: int) -> Arrays:
    """Greedy tokens through the KV cache, past any eos, and each step's top-2 gap [B, N]."""
    model.generation_config.eos_token_id = None
    prompt = ids[:, :prompt_len]
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(result.logits, 1).topk(2, -1).values
    return {
        "prompt_len": np.int32(prompt_len),
        "greedy": result.sequences[:, prompt_len:].int().numpy(),
        "greedy_gap": (best[..., 0] - best[..., 1]).numpy(),
    }


def load_mtp(model: Any, cfg: Config, weights: Tensors) -> MtpModel:
    """transformers' MtpModel over the trunk, with every module's weights proven to be in it."""
    layers = cfg["num_hidden_layers"]
    depth = cfg["num_nextn_predict_layers"]
    # MtpModel finds its weights by this list, and the class knows only layer 61.
    model._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{layers + k}\..*" for k in range(depth)
    ]
    mtp = MtpModel.from_pretrained(model).eval()
    if mtp.config._attn_implementation != "eager" or mtp.config._experts_implementation != "eager":
        raise AssertionError("MtpModel does not run eager")
    rename = {"shared_head.norm.": "post_norm."}
    own = ("enorm.", "hnorm.", "eh_proj.", "post_norm.")
    for k in range(depth):
        prefix, found = f"model.layers.{layers + k}.", {}
        for name, w in weights.items():
            if name.startswith(prefix) and not name.endswith(
                ("embed_tokens.weight", "shared_head.head.weight")
            ):
                key = name.removeprefix(prefix)
                key = next(
                    (
                        new + key.removeprefix(old)
                        for old, new in rename.items()
                        if key.startswith(old)
                    ),
                    key,
                )
                found[key if key.startswith(own) else "mtp_block." + key] = w
        check_arrived(mtp.layers[k], "", found)
    return mtp


def run_mtp(mtp: MtpModel, final: torch.Tensor, ids: torch.Tensor, *, hf_positions: bool) -> Arrays:
    """Teacher-forced chain; row i of depth k reads t[i+k] and predicts t[i+k+1].

    Rope positions are i (as in engines), or, with `hf_positions`, i + k through an `MtpCache` as
    in HF's generate.
    """
    out: Arrays = {}
    hidden = final
    cache = MtpCache(config=mtp.config) if hf_positions else None
    for k in range(1, len(mtp.layers) + 1):
        tokens, anchors = ids[:, k:], ids.shape[1] - k
        positions = torch.arange(anchors)[None] + (k if hf_positions else 0)
        shape = (ids.shape[0], anchors)
        hook = hook_router(mtp.layers[k - 1].mtp_block.mlp.gate, f"mtp_*_{k}", shape, out)
        with torch.no_grad():
            hidden = mtp.forward_layer(
                k - 1, hidden[:, :anchors], positions, cache, input_ids=tokens
            )
            out[f"mtp_logits_{k}"] = mtp._project_to_logits(hidden).numpy()
        out[f"mtp_hidden_{k}"] = hidden.numpy()
        hook.remove()
    return out


def check_drafting(model: Any, golden: Arrays, tolerance: float) -> None:
    """HF's `generate(use_mtp=True)` feeds the chain what run_mtp does and emits the same tokens."""
    fed: list[torch.Tensor] = []
    original = MtpModel.forward_layer

    def spy(
        self: Any, layer_idx: int, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        result = original(self, layer_idx, hidden, *args, **kwargs)
        fed.extend([hidden, result])
        return result

    prompt_len = int(golden["prompt_len"])
    prompt = torch.from_numpy(golden["ids"][:1, :prompt_len]).long()
    MtpModel.forward_layer = spy  # type: ignore[method-assign]
    try:
        new = golden["greedy"].shape[1]
        mask = torch.ones_like(prompt)
        tokens = model.generate(
            prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, use_mtp=True
        )
    finally:
        MtpModel.forward_layer = original  # type: ignore[method-assign]
    if not np.array_equal(tokens[0, prompt_len:].numpy(), golden["greedy"][0]):
        raise AssertionError("generate(use_mtp=True) emits other greedy tokens")
    if worst_row(fed[0].numpy(), golden["final"][:1, :prompt_len]) > tolerance:
        raise AssertionError("HF feeds depth 1 something else than the state after model.norm")
    if not torch.equal(fed[1], fed[2]):
        raise AssertionError(
            "HF feeds depth 2 something else than depth 1's state after shared_head.norm"
        )
