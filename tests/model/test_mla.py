"""Latent attention: expanded == absorbed == the float64 oracle, on one layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.layers.mla import Mla
from dskjax.layers.rope import half_split_order, rope_tables
from dskjax.params import bind
from pallas_kernels import (
    LatentCache,
    MlaPrefillPlan,
    dequantise,
    mla_decode,
    mla_prefill,
    quant,
    quantise,
)
from pallas_kernels.testing import assert_close, jit
from tests.model.common import tiny
from tests.oracles import deepseek, weights
from tests.tolerances import LAYER

T = 11
NAMES = ["tiny-v3", "tiny-v2lite"]
LAYER_0 = "model.layers.0.self_attn."


@functools.cache
def inputs(name):
    """(cfg, params of layer 0, x [T, D])."""
    t = tiny(name)
    params = jax.tree.map(lambda w: w[0], t.params["dense_layers"]["self_attn"])
    return t.cfg, params, np.random.default_rng(3).standard_normal((T, t.cfg.hidden_size))


@functools.cache
def expected(name):
    t = tiny(name)
    return deepseek.attention(t.raw, LAYER_0, inputs(name)[2], t.hf)


def project(mla, cfg, x):
    tables = rope_tables(jnp.arange(T), cfg.mla.qk_rope_head_dim, cfg.rope)
    return mla.project(jnp.asarray(x, jnp.float32), tables, impl="reference")


def expanded(cfg, params, x, scale):
    mla = bind(Mla, params, cfg)
    p = project(mla, cfg, x)
    k_nope, v = mla.expand(p.latent, impl="reference")
    seq, pos = jnp.zeros(T, jnp.int32), jnp.arange(T, dtype=jnp.int32)
    plan = MlaPrefillPlan(seq, pos, seq, pos)
    out, _ = mla_prefill(p.q_nope, p.q_rope, k_nope, p.k_rope, v, plan, scale=scale)
    return mla.output(out, impl="reference")


def absorbed(cfg, params, x, scale):
    mla = bind(Mla, params, cfg)
    p = project(mla, cfg, x)
    cache = LatentCache(p.latent[None, None], p.k_rope[None, None])  # one page of T slots
    lens, starts = jnp.asarray([T]), jnp.asarray([0, T])
    out, _ = mla_decode(
        mla.absorb(p.q_nope),
        p.q_rope,
        cache,
        0,
        jnp.zeros((1, 1), jnp.int32),
        lens,
        starts,
        scale=scale,
    )
    return mla.output(mla.unabsorb(out), impl="reference")


FORMS = {"expanded": expanded, "absorbed": absorbed}


@functools.cache
def compiled(form, cfg, scale):
    return jit(lambda params, x: FORMS[form](cfg, params, x, scale))


def check(form, name, change=lambda params: params, scale=None):
    """`change` edits the params, `scale` replaces the softmax scale: both for planted bugs."""
    cfg, params, x = inputs(name)
    out = compiled(form, cfg, scale or cfg.softmax_scale)(change(params), x)
    assert_close(out, expected(name), LAYER)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_matches_oracle(form, name):
    check(form, name)


def test_projections_match_oracle():
    """Queries, normed latent and un-normed rope key; rotary channels in half-split order."""
    t, (cfg, params, x) = tiny(), inputs("tiny-v3")
    p = jit(lambda w: project(bind(Mla, w, cfg), cfg, x).__dict__)(params)
    order = half_split_order(cfg.mla.qk_rope_head_dim)
    want = deepseek.attention_parts(t.raw, LAYER_0, x, np.arange(T), t.hf)
    for name, value in zip(("q_nope", "q_rope", "latent", "k_rope"), want, strict=True):
        assert_close(p[name], value[..., order] if "rope" in name else value, LAYER, name)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_up_projection_is_dequantized_in_both_forms(form):
    cfg, params, x = inputs("tiny-v3")
    q = quantise(params["kv_b_proj"], quant.FP8_BLOCK)
    run = compiled(form, cfg, cfg.softmax_scale)
    got = run(params | {"kv_b_proj": q}, x)
    assert_close(got, run(params | {"kv_b_proj": dequantise(q)}, x), LAYER)


# ------------------------------------------------------------------ planted bugs


def _rows(name, change):
    return lambda params: params | {name: change(params[name])}


def _heads(w):
    cfg = tiny().cfg
    return w.reshape(cfg.num_attention_heads, -1, w.shape[-1])


def _kv_b_in_blocks(w):
    """What a split into [all heads k | all heads v] would read."""
    n = tiny().cfg.mla.qk_nope_head_dim
    k, v = _heads(w)[:, :n], _heads(w)[:, n:]
    both = jnp.concatenate([k.reshape(-1, w.shape[-1]), v.reshape(-1, w.shape[-1])])
    return both.reshape(w.shape)


def _value_first(w):
    v = tiny().cfg.mla.v_head_dim
    return jnp.roll(_heads(w), v, axis=1).reshape(w.shape)


def _rope_first(w):
    return jnp.roll(_heads(w), tiny().cfg.mla.qk_rope_head_dim, axis=1).reshape(w.shape)


def _interleaved(params):
    """The rotary rows as the checkpoint has them."""
    t = tiny()
    raw = weights.attention(t.raw, LAYER_0, t.hf, reorder=False)
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), raw)


BUGS = {
    "rotary rows left interleaved": _interleaved,
    "kv_b split in blocks": _rows("kv_b_proj", _kv_b_in_blocks),
    "kv_b value first": _rows("kv_b_proj", _value_first),
    "query rope first": _rows("q_b_proj", _rope_first),
    "kv_a rope first": _rows("kv_a_proj_with_mqa", lambda w: jnp.roll(w, 8, axis=0)),
    "latent norm skipped": lambda p: p | {"kv_a_layernorm": {"weight": jnp.ones(32)}},
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("form", FORMS)
def test_suite_sees(form, bug):
    with pytest.raises(AssertionError):
        check(form, "tiny-v3", BUGS[bug])


@pytest.mark.parametrize("form", FORMS)
def test_suite_sees_the_scale_of_the_latent_width(form):
    with pytest.raises(AssertionError):
        check(form, "tiny-v3", scale=40**-0.5)
