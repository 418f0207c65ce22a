"""The whole model against Hugging Face transformers, layer by layer, from its files.

The goldens of `tests/goldens` come from transformers in float32 (`scripts/make_goldens.py`), which
itself agrees with an independent float64 implementation to `fp32_noise`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model
from dskjax.checkpoint import load_config, load_hf
from dskjax.layers.rope import inverse_frequencies
from tests.goldens.cases import CASES

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = [case.name for case in CASES]
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


@pytest.mark.parametrize("name", NAMES)
def test_every_hidden_state_router_choice_and_logit(name):
    golden = dict(np.load(GOLDENS / name / "golden.npz"))
    params, cfg = load_hf(GOLDENS / name, dtype=jnp.float32)
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
