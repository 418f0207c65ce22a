"""Gate, experts and shared experts of one layer against the float64 oracle; SwiGLU and RMSNorm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.layers import moe as layer
from dskjax.layers.mlp import SwiGlu
from dskjax.layers.moe import Experts, Moe
from dskjax.layers.norm import RmsNorm
from dskjax.params import bind
from pallas_kernels import swiglu
from pallas_kernels.testing import assert_close, assert_equal, jit
from tests.model.common import tiny
from tests.oracles import deepseek
from tests.tolerances import LAYER

T = 23
LAYER_1 = "model.layers.1.mlp."
PARTS = ("gate", "up", "down")


@functools.cache
def inputs(name):
    """(cfg, params of the first MoE layer, x [T, D])."""
    t = tiny(name)
    params = jax.tree.map(lambda w: w[0], t.params["moe_layers"]["mlp"])
    return t.cfg, params, np.random.default_rng(5).standard_normal((T, t.cfg.hidden_size))


@functools.cache
def expected(name):
    t = tiny(name)
    return deepseek.moe(t.raw, LAYER_1, inputs(name)[2], t.hf)


@functools.cache
def compiled(cfg, impl):
    return jit(lambda p, x: bind(Moe, p, cfg.hidden_size, cfg.moe)(x, impl=impl))


def run(name, params, impl="reference"):
    cfg, _, x = inputs(name)
    return compiled(cfg, impl)(params, jnp.asarray(x, jnp.float32))


def check(name, change=lambda params: params, impl="reference"):
    out, experts = run(name, change(inputs(name)[1]), impl)
    want_out, want_experts = expected(name)
    assert_equal(experts, want_experts, "experts")
    assert_close(out, want_out, LAYER)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("tiny-v3", "reference"),
        ("tiny-v3", "xla"),
        ("tiny-v2", "reference"),
        ("tiny-v2lite", "reference"),
        ("tiny-kimi", "reference"),
    ],
)
def test_matches_oracle(name, impl):
    check(name, impl=impl)


def test_gradient_matches_finite_differences():
    """Moves x and the experts' weights along random directions; the oracle is float64."""
    t, (cfg, params, x) = tiny(), inputs("tiny-v3")
    rng, step = np.random.default_rng(8), 1e-6
    dy, dx = rng.standard_normal(x.shape), rng.standard_normal(x.shape)
    names = [f"{LAYER_1}experts.{e}.{part}_proj.weight" for e in range(16) for part in PARTS]
    moved = {name: rng.standard_normal(t.raw[name].shape) for name in names}

    def loss(p, x):
        return (bind(Moe, p, cfg.hidden_size, cfg.moe)(x, impl="xla")[0] * dy).sum()

    dp, got_x = jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(x, jnp.float32))
    gate, up, down = (
        np.stack([moved[f"{LAYER_1}experts.{e}.{part}_proj.weight"] for e in range(16)])
        for part in PARTS
    )
    got_w = np.vdot(dp["experts"]["gate_up_proj"], np.stack([gate, up], 1))
    got_w += np.vdot(dp["experts"]["down_proj"], down)

    def at(s, along_x, along_w):
        raw = t.raw | {name: t.raw[name] + s * along_w * d for name, d in moved.items()}
        return (deepseek.moe(raw, LAYER_1, x + s * along_x * dx, t.hf)[0] * dy).sum()

    for got, along in ((np.vdot(got_x, dx), (1, 0)), (got_w, (0, 1))):
        want = (at(step, *along) - at(-step, *along)) / (2 * step)
        assert got == pytest.approx(want, rel=1e-4)


def test_some_expert_has_no_token_and_some_have_many():
    counts = np.bincount(expected("tiny-v3")[1].ravel(), minlength=16)
    assert counts.min() < 3 and counts.max() > 8


def test_gate_is_fp32_whatever_the_compute_dtype():
    """With bf16 activations and weights, logits are fp32 products of the rounded values."""
    cfg, params, x = inputs("tiny-v3")
    gate = params["gate"] | {"weight": params["gate"]["weight"].astype(jnp.bfloat16)}
    x16 = jnp.asarray(x, jnp.bfloat16)
    call = lambda p, x: bind(layer.Gate, p, cfg.hidden_size, cfg.moe)(x, impl="auto")  # noqa: E731
    got = jit(call)(gate, x16)
    wide = gate | {"weight": gate["weight"].astype(jnp.float32)}
    want = jit(call)(wide, x16.astype(jnp.float32))
    jax.tree.map(assert_equal, got, want)
    exact, wider = jit(call)(params["gate"], x16), x16.astype(jnp.float32)
    jax.tree.map(assert_equal, exact, jit(call)(params["gate"], wider))
    assert got[0].dtype == jnp.float32


def test_bias_is_fp32_and_moves_choices_only():
    cfg, params, x = inputs("tiny-v3")
    moved = jax.tree.map(lambda w: w, params)
    moved["gate"]["e_score_correction_bias"] += 5.0  # the same for all: nothing changes
    for got, want in zip(run("tiny-v3", moved), expected("tiny-v3"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_greedy_gate_ignores_groups():
    """V2-Lite's config names groups; only the group-limited gate of V2 heeds them."""
    cfg, params, _ = inputs("tiny-v2")
    greedy = dataclasses.replace(cfg.moe, topk_method="greedy")
    x = jnp.asarray(inputs("tiny-v2")[2], jnp.float32)
    chosen = {}
    for name, moe in {"limited": cfg.moe, "greedy": greedy}.items():
        call = jit(lambda p, x, m=moe: bind(layer.Gate, p, cfg.hidden_size, m)(x, impl="auto"))
        chosen[name] = np.sort(call(params["gate"], x)[1], axis=1)
    groups = [len(set(row)) for row in chosen["greedy"] // 4]
    assert max(groups) == 3, "no row would use more groups than topk_group"
    assert all(len(set(row)) <= 2 for row in chosen["limited"] // 4)


def test_swiglu_gates_with_the_first_half():
    cfg, x = tiny().cfg, np.random.default_rng(0).standard_normal((5, 128))
    params = jax.tree.map(lambda w: w[0], tiny().params["dense_layers"]["mlp"])
    call = jit(
        lambda p: bind(SwiGlu, p, cfg.hidden_size, cfg.intermediate_size)(
            jnp.asarray(x, jnp.float32), impl="reference"
        )
    )
    want = deepseek.mlp(tiny().raw, "model.layers.0.mlp.", x)
    assert_close(call(params), want, LAYER)
    swapped = params | {"gate_up_proj": params["gate_up_proj"][::-1]}
    with pytest.raises(AssertionError):
        assert_close(call(swapped), want, LAYER)


def test_swiglu_is_computed_in_fp32():
    pair = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8)), jnp.bfloat16)
    want = swiglu(pair.astype(jnp.float32)).astype(jnp.bfloat16)
    assert_equal(swiglu(pair), want)


def test_rms_norm_keeps_the_dtype_and_its_statistics_are_fp32():
    x = np.random.default_rng(0).standard_normal((3, 16)) * 300  # squares overflow in fp16
    params = {"weight": jnp.asarray(np.linspace(0.5, 1.5, 16), jnp.float32)}
    call = lambda x: bind(RmsNorm, params, 16, 1e-6, "embed")(x)  # noqa: E731
    want = deepseek.rms_norm(x, np.linspace(0.5, 1.5, 16), 1e-6)
    assert_close(call(jnp.asarray(x, jnp.float32)), want, LAYER)
    params = {"weight": params["weight"].astype(jnp.float16)}
    half = call(jnp.asarray(x, jnp.float16))
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, want, rtol=4e-3)


# ------------------------------------------------------------------ planted bugs


def _shared(factor):
    """Scaling the shared experts' output, written as scaling their last weight."""

    def change(params):
        shared = params["shared_experts"]
        return params | {"shared_experts": shared | {"down_proj": shared["down_proj"] * factor}}

    return change


def _reversed_experts(params):
    return params | {"experts": jax.tree.map(lambda w: w[::-1], params["experts"])}


BUGS = {
    "shared experts scaled": _shared(2.5),
    "shared experts dropped": _shared(0.0),
    "experts in another order": _reversed_experts,
    "bias forgotten": lambda p: (
        p | {"gate": p["gate"] | {"e_score_correction_bias": jnp.zeros(16)}}
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    with pytest.raises(AssertionError):
        check("tiny-v3", BUGS[bug])


def check_v2_shared_width(change=lambda p: p):
    check("tiny-v2lite", change)


def test_suite_sees_only_the_first_shared_expert():
    """n_shared_experts = 2 is one MLP of width 2F; half of it would be one expert."""

    def half(params):
        shared = dict(params["shared_experts"])
        shared["down_proj"] = shared["down_proj"].at[:, 32:].set(0)
        return params | {"shared_experts": shared}

    with pytest.raises(AssertionError):
        check("tiny-v2lite", half)


def with_experts(monkeypatch, change):
    """Replaces what `Moe` does with its routed experts: change(call, x, weights, experts)."""
    original = Experts.__call__

    def patched(self, x, weights, experts, **how):
        return change(lambda *a: original(self, *a, **how), x, weights, experts)

    monkeypatch.setattr(Experts, "__call__", patched)
    monkeypatch.setitem(globals(), "compiled", compiled.__wrapped__)  # trace again


MISTAKES = {
    "weights applied twice": lambda call, x, w, e: call(x, w * w, e),
    "weights not applied": lambda call, x, w, e: call(x, jnp.ones_like(w), e),
    "weights of another token": lambda call, x, w, e: call(x, jnp.roll(w, 1, axis=0), e),
    "best expert only": lambda call, x, w, e: call(x, w, jnp.repeat(e[:, :1], e.shape[1], 1)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_suite_sees_a_wrong_combine(mistake, monkeypatch):
    with_experts(monkeypatch, MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check("tiny-v3")


def test_padding_rows_do_not_disturb_others():
    """A NaN row goes to some experts and stays there."""
    cfg, params, x = inputs("tiny-v3")
    x = jnp.asarray(x, jnp.float32).at[4].set(jnp.nan)
    for impl in ("reference", "xla"):
        out, _ = compiled(cfg, impl)(params, x)
        rest = np.arange(T) != 4
        assert_close(np.asarray(out)[rest], expected("tiny-v3")[0][rest], LAYER)
