"""The whole model against Hugging Face transformers, layer by layer, from its files.

The goldens of `tests/goldens` come from transformers in float32 (`scripts/make_goldens.py`), which
itself agrees with an independent float64 implementation to `fp32_noise`.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model
from dskjax.checkpoint import load_config, load_hf
from dskjax.decode import generate
from dskjax.layers.rope import inverse_frequencies
from dskjax.params import named_leaves, tree_of
from dskjax.quantise import LINEARS
from pallas_kernels import QTensor
from tests.goldens.cases import CASES

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = [case.name for case in CASES]
FP8 = [case.name for case in CASES if case.fp8]
FORMS = [(name, "keep") for name in NAMES] + [(name, "dequantise") for name in FP8]
TOLERANCE = 2e-5  # relative error in the 2-norm, for logits and every hidden state


def close(found, golden, what):
    found, golden = np.asarray(found, np.float64), np.asarray(golden, np.float64)
    assert found.shape == golden.shape, what
    error = np.linalg.norm(found - golden) / np.linalg.norm(golden)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def same_experts(found, golden, what):
    assert np.array_equal(np.sort(found, axis=-1), golden), what


@pytest.mark.parametrize("name", NAMES)
def test_constants(name):
    golden, cfg = np.load(GOLDENS / name / "golden.npz"), load_config(GOLDENS / name)
    assert np.isclose(cfg.softmax_scale, golden["softmax_scale"], rtol=1e-7)
    assert cfg.mla.norm_eps == golden["mla_norm_eps"]
    factor = 1.0 if cfg.rope.yarn is None else cfg.rope.yarn.attention_factor
    assert np.isclose(factor, golden["rope_multiplier"], rtol=1e-7)
    speeds = inverse_frequencies(cfg.mla.qk_rope_head_dim, cfg.rope)
    np.testing.assert_allclose(speeds, golden["inv_freq"], rtol=1e-6)


def quantised_leaves(params):
    leaves = dict(named_leaves(params))
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QTensor)}


def load(name, quantised="keep"):
    """Params and config; FP8 weights are QTensors exactly if they are to be kept."""
    params, cfg = load_hf(GOLDENS / name, dtype=jnp.float32, quantised=quantised)
    found = {path.rpartition(".")[2] for path in quantised_leaves(params)}
    kept = LINEARS - {"q_proj"} if name in FP8 and quantised == "keep" else set()
    assert found == kept
    return params, cfg


def check(golden, params, cfg):
    depths = cfg.mtp.num_nextn_predict_layers

    @jax.jit
    def run(params, ids):
        trunk = model.trunk(params, ids, cfg=cfg, capture=True)
        chain = model.mtp_chain(params, ids, trunk.hidden, cfg=cfg, depths=depths)
        logits = [model.head(params, h, cfg=cfg) for h in (trunk.hidden, *chain.hidden)]
        return trunk, chain, logits

    trunk, chain, logits = run(params, golden["ids"])
    close(trunk.embedded, golden["embed"], "embed")
    for i in range(cfg.num_hidden_layers):
        close(trunk.layers[i], golden[f"layer_{i}"], f"layer_{i}")
        if (at := i - cfg.num_dense_layers) >= 0:
            same_experts(trunk.experts[at], golden[f"experts_{i}"], f"experts_{i}")
    close(trunk.hidden, golden["final"], "final")
    close(logits[0], golden["logits"], "logits")
    assert depths == sum(key.startswith("mtp_logits_") for key in golden)
    for k in range(1, depths + 1):  # the last k rows have no token to look at
        close(chain.hidden[k - 1][:, :-k], golden[f"mtp_hidden_{k}"], f"mtp_hidden_{k}")
        close(logits[k][:, :-k], golden[f"mtp_logits_{k}"], f"mtp_logits_{k}")
        experts = chain.experts[k - 1][:, :-k]
        same_experts(experts, golden[f"mtp_experts_{k}"], f"mtp_experts_{k}")


@pytest.mark.parametrize(("name", "quantised"), FORMS)
def test_every_hidden_state_router_choice_and_logit(name, quantised):
    check(dict(np.load(GOLDENS / name / "golden.npz")), *load(name, quantised))


@pytest.mark.parametrize("name", ["v2_groups", "kimi", *FP8])
def test_greedy_tokens(name):
    """Through the cache; FP8 weights stay as they are stored."""
    golden, (params, cfg) = np.load(GOLDENS / name / "golden.npz"), load(name)
    prompts = golden["ids"][:, : int(golden["prompt_len"])].tolist()
    count, drafts = golden["greedy"].shape[1], 2 * min(cfg.mtp.num_nextn_predict_layers, 1)
    result = generate(
        params, cfg, prompts, max_tokens=count, drafts=drafts, accept="strict", ignore_eos=True
    )
    assert result.ties == 0
    assert np.array_equal(result.tokens, golden["greedy"])


# ------------------------------------------------------------------ what the FP8 goldens must see


def test_the_ragged_checkpoint_is_what_it_is_for():
    """Scales apart from their weights, cut blocks on both sides, some scales powers of two."""
    index = json.loads((GOLDENS / "fp8_ragged" / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    scales = [name for name in where if name.endswith("_scale_inv")]
    apart = [name for name in scales if where[name] != where[name.removesuffix("_scale_inv")]]
    assert 0 < len(apart) < len(scales)
    leaves = quantised_leaves(load("fp8_ragged")[0])
    shapes = {(path.rpartition(".")[2], leaf.scales.shape[-2:]) for path, leaf in leaves.items()}
    assert {("kv_a_proj_with_mqa", (1, 2)), ("kv_b_proj", (2, 1)), ("o_proj", (2, 1))} <= shapes
    for path, leaf in leaves.items():
        mantissa, _ = np.frexp(leaf.scales)
        assert (mantissa == 0.5).all() == (".mlp." in path), path


def _other_block(axis):
    return lambda scales: jnp.roll(scales, 1, axis=axis)


BUGS = {
    "scales divide": ("fp8_ragged", "moe_layers.mlp.experts.down_proj", lambda s: 1 / s),
    "scales of the next rows": ("fp8_ragged", "moe_layers.self_attn.kv_b_proj", _other_block(-2)),
    "scales of the next columns": ("fp8_aligned", "dense_layers.mlp.down_proj", _other_block(-1)),
    "gate's scales at up": ("fp8_aligned", "moe_layers.mlp.experts.gate_up_proj", _other_block(-3)),
    "scales of the next rows, in MTP": (
        "fp8_ragged",
        "mtp_layers.block.self_attn.o_proj",
        _other_block(-2),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_fp8_goldens_see(bug):
    name, path, change = BUGS[bug]
    params, cfg = load(name)
    leaf = quantised_leaves(params)[path]
    leaves = dict(named_leaves(params))
    wrong = dataclasses.replace(leaf, scales=change(leaf.scales))
    with pytest.raises(AssertionError):
        golden = dict(np.load(GOLDENS / name / "golden.npz"))
        check(golden, tree_of(leaves | {path: wrong}), cfg)
