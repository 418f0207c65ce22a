"""Rotary embedding and YaRN: golden values, and the order of channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import presets
from dskjax.config import RopeConfig, YarnConfig, yarn_mscale
from dskjax.layers.rope import half_split_order, inverse_frequencies, rope_tables
from pallas_kernels.rope import rotate
from pallas_kernels.testing import assert_close
from tests.oracles import deepseek
from tests.tolerances import ROPE

V3, V2, V2_LITE = presets.deepseek_v3(), presets.deepseek_v2(), presets.deepseek_v2_lite()
MOONLIGHT, K2 = presets.moonlight_16b_a3b(), presets.kimi_k2()
CHANNELS = [8, 11, 12, 16, 20, 22, 23, 31]
V3_SPEEDS = [0.1, 0.0390069, 0.0268794, 0.0055, 7.90569e-4, 1.77828e-4, 3.3338e-5, 3.3338e-6]
K2_SPEEDS = [0.066874, 0.024251, 0.0172936, 0.00447214, 3.61405e-5, 1.83784e-5]
K2_SPEEDS += [1.31059e-5, 8.76441e-7]


@pytest.mark.parametrize(
    ("cfg", "speeds"),
    [(V3, V3_SPEEDS), (V2, V3_SPEEDS), (V2_LITE, V3_SPEEDS), (K2, K2_SPEEDS)],
)
def test_golden_inverse_frequencies(cfg, speeds):
    np.testing.assert_allclose(inverse_frequencies(64, cfg.rope)[CHANNELS], speeds, rtol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "low", "high"), [(V3, 10, 23), (V2, 10, 23), (V2_LITE, 10, 23), (K2, 19, 20)]
)
def test_ramp_lies_between_the_golden_bounds(cfg, low, high):
    """Channels up to `low` keep their speed, from `high` on they are divided by the factor."""
    plain = cfg.rope.rope_theta ** -(np.arange(32) / 32)
    ratio = inverse_frequencies(64, cfg.rope) / plain
    assert deepseek.yarn_bounds(cfg.to_hf()) == (low, high)
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-12)
    np.testing.assert_allclose(ratio[high:], 1 / cfg.rope.yarn.factor, rtol=1e-12)
    assert (np.diff(ratio[low : high + 1]) < 0).all()


@pytest.mark.parametrize("cfg", [presets.preset(name) for name in presets.PRESETS])
def test_inverse_frequencies_match_oracle(cfg):
    want = deepseek.inverse_frequencies(cfg.to_hf())
    got = inverse_frequencies(cfg.mla.qk_rope_head_dim, cfg.rope)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_without_yarn_the_speeds_are_plain():
    want = [5e4 ** (-2 * j / 64) for j in range(32)]
    np.testing.assert_allclose(inverse_frequencies(64, MOONLIGHT.rope), want)


def test_equal_ramp_ends_do_not_divide_by_zero():
    yarn = YarnConfig(factor=4.0, original_max_position_embeddings=8, beta_fast=32.0)
    assert np.isfinite(inverse_frequencies(2, RopeConfig(yarn=yarn))).all()


def check_softmax_scale(cfg, want):
    assert cfg.softmax_scale == pytest.approx(want, rel=1e-9)


GOLDEN_SCALES = [
    (V3, 0.1352337789),
    (V2, 0.1147213868),
    (V2_LITE, 0.1147213868),
    (K2, 0.1308608000),
    (MOONLIGHT, 0.0721687836),
]


@pytest.mark.parametrize(("cfg", "want"), GOLDEN_SCALES)
def test_golden_softmax_scale(cfg, want):
    check_softmax_scale(cfg, want)


def test_softmax_scale_follows_mscale_all_dim_alone():
    yarn = dataclasses.replace(V3.rope.yarn, mscale_all_dim=0.707)
    check_softmax_scale(dataclasses.replace(V3, rope=RopeConfig(yarn=yarn)), 0.1147213868)


@pytest.mark.parametrize(
    ("factor", "mscale", "want"),
    [
        (40.0, 1.0, 1.3688879454),
        (40.0, 0.707, 1.2608037774),
        (32.0, 1.0, 1.3465735903),
        (1.0, 1.0, 1.0),
    ],
)
def test_golden_mscale(factor, mscale, want):
    assert yarn_mscale(factor, mscale) == pytest.approx(want, rel=1e-10)


def check_tables(cfg):
    """cos^2 + sin^2 = 1: neither table carries mscale."""
    cos, sin = rope_tables(jnp.arange(9), 64, cfg.rope)
    np.testing.assert_allclose(np.square(cos) + np.square(sin), 1, rtol=1e-6)


@pytest.mark.parametrize("cfg", [V3, V2, V2_LITE, K2])
def test_cos_and_sin_are_not_scaled(cfg):
    assert cfg.rope.yarn.attention_factor == 1.0
    check_tables(cfg)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "want"),
    [(0.0, 0.0, 1.3688879454), (1.0, 0.707, 1.3688879454 / 1.2608037774)],
)
def test_attention_factor_of_other_settings(mscale, all_dim, want):
    yarn = dataclasses.replace(V3.rope.yarn, mscale=mscale, mscale_all_dim=all_dim)
    assert yarn.attention_factor == pytest.approx(want, rel=1e-9)
    cos, _ = rope_tables(jnp.zeros(1, jnp.int32), 64, RopeConfig(yarn=yarn))
    np.testing.assert_allclose(cos, want, rtol=1e-6)


# ------------------------------------------------------------------ order of channels


@pytest.mark.parametrize("heads", [(), (3,)])
def test_half_split_on_permuted_channels_is_interleaved_rotation(heads):
    """rotate(x[order]) == interleaved_rotate(x)[order], far positions included."""
    positions = np.array([0, 1, 7, 4095, 163839])
    x = np.random.default_rng(0).standard_normal((5, *heads, 64))
    order = half_split_order(64)
    tables = rope_tables(jnp.asarray(positions, jnp.int32), 64, V3.rope)
    got = rotate(jnp.asarray(x[..., order], jnp.float32), tables)
    want = deepseek.rotate_interleaved(x, positions, V3.to_hf())[..., order]
    assert_close(got[:3], want[:3], ROPE["near"])
    assert_close(got[3:], want[3:], ROPE["far"])


def test_half_split_order():
    np.testing.assert_array_equal(half_split_order(8), [0, 2, 4, 6, 1, 3, 5, 7])


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 64)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = (
            rotate(x, rope_tables(jnp.asarray([at], jnp.int32), 64, V3.rope))
            for x, at in ((q, at_q), (k, at_k))
        )
        return float(jnp.vdot(*turned))

    assert score(5, 3) == pytest.approx(score(1002, 1000), abs=1e-3)
    assert abs(score(5, 3) - score(3, 5)) > 0.1


def test_angles_are_fp32_and_the_dtype_is_kept():
    """bf16 positions would break past 256: the rotation of 257 is not that of 256."""
    tables = rope_tables(jnp.asarray([256, 257], jnp.int32), 64, V3.rope)
    assert tables[0].dtype == jnp.float32
    out = rotate(jnp.ones((2, 64), jnp.bfloat16), tables)
    assert out.dtype == jnp.bfloat16 and (out[0] != out[1]).any()
