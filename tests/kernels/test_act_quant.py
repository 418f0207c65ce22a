"""`act_quant`: scales to the last bit or two, values exactly, against tables of the format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import QTensor, act_quant, quant
from pallas_kernels.act_quant import api, cases
from pallas_kernels.testing import assert_equal, call, distinct, jit
from tests.oracles import formats
from tests.tolerances import SCALE_ULPS

IMPLS = distinct(api.IMPLEMENTATIONS)
CASES = {case.name: case for case in cases.CASES}


def run(impl):
    if impl == "triton" and jax.default_backend() == "cpu":
        return interpreted

    def op(x, recipe):
        if impl == "triton" and (reason := api.triton_refusal(x, recipe)):
            pytest.skip(reason)
        return act_quant(x, recipe, impl=impl)

    return op


def interpreted(x, recipe):
    from pallas_kernels.act_quant import triton

    if reason := api.triton_refusal(x, recipe):
        pytest.skip(reason)
    return triton.act_quant(x, recipe, tiles=triton.Tiles(elements=2**14), interpret=True)


def check(op, case):
    args = case.make(0, poison=case.quant != "tensor")
    x, recipe = np.asarray(args["x"]).astype(np.float32), args["recipe"]
    q = call(op, args)
    block = tuple(b or n for b, n in zip(recipe.block, x.shape[-2:], strict=True))
    assert q.block == block and q.format == "e4m3" and q.values.dtype == jnp.float8_e4m3fn
    codes, scales = np.asarray(q.values).view(np.uint8), np.asarray(q.scales)
    rows = slice(None) if case.quant == "tensor" else slice(-1)  # the last row is poisoned
    check_rows(x[..., rows, :], codes[..., rows, :], scales[..., rows, :], block, recipe)


def check_rows(x, codes, scales, block, recipe):
    assert scales.dtype == np.float32 and np.isfinite(scales).all()
    amax = np.float64(formats.block_amax(x, block, recipe.floor))
    if recipe.ue8m0:
        assert_equal(scales, np.vectorize(formats.power_above)(amax / 448).astype(np.float32))
    else:
        ulps = np.abs(scales - amax / 448) / np.spacing(np.float32(amax / 448))
        assert ulps.max() <= SCALE_ULPS, f"scales are {ulps.max()} ulps off"
    wide = scales.repeat(block[0], -2)[..., : x.shape[-2], :].repeat(block[1], -1)
    assert_equal(codes, formats.to_e4m3(x / wide[..., : x.shape[-1]]), "values")
    real = formats.from_e4m3(codes) * wide[..., : x.shape[-1]]
    assert not np.isnan(real).any()
    # Half a step of e4m3: 2^-4 of the value, or half the smallest subnormal.
    limit = np.maximum(np.abs(x) * 2.0**-4, 2.0**-10 * wide[..., : x.shape[-1]]) * (1 + 1e-6)
    assert (np.abs(real - x) <= limit).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_matches_oracle_on_real_shapes(impl, case):
    check(run(impl), case)


@settings(max_examples=30)
@given(amax=st.floats(2.0**-13, 2.0**99, width=32), tail=st.floats(-1, 1, width=32))
def test_any_magnitude(amax, tail):
    x = np.float32([[amax, -amax * 0.3, amax * tail, 0]])
    for recipe in (quant.FP8_TILE, quant.FP8_TILE_UE8M0):
        q = call(act_quant, {"x": jnp.asarray(x), "recipe": recipe})
        check_rows(x, np.asarray(q.values).view(np.uint8), np.asarray(q.scales), (1, 4), recipe)


@pytest.mark.parametrize("compiled", [False, True])
def test_ue8m0_is_exact_at_and_beside_powers_of_two(compiled):
    """amax = 448 * 2^k has scale 2^k; one float32 above it has 2^(k+1), and nothing is clipped."""
    powers = np.float32(2.0 ** np.arange(-20, 21))[:, None]
    amax = 448 * powers
    op = jit(act_quant, static_argnames="recipe") if compiled else act_quant
    for x, want in (
        (amax, powers),
        (np.nextafter(amax, np.float32(np.inf)), 2 * powers),
        (np.nextafter(amax, np.float32(0)), powers),
    ):
        x = x[22:] if (x < quant.MIN_AMAX).any() else x
        assert_equal(op(jnp.asarray(x), recipe=quant.FP8_TILE_UE8M0).scales, want[-len(x) :])


def test_only_e4m3_recipes_are_taken():
    with pytest.raises(ValueError, match="not 'int4'"):
        act_quant(jnp.ones((1, 128)), quant.INT4_GROUP)


# ------------------------------------------------------------------ bias


def check_bias(op):
    """The mean of the signed error is far below its spread: rounding prefers no direction."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.uniform(0.25, 1, (512, 128)) * rng.choice([-1, 1], (512, 128)))
    q = call(op, {"x": jnp.asarray(x), "recipe": quant.FP8_TILE})
    error = (np.float64(quant.dequantise(q)) - x) / np.abs(x)
    count = error.size**0.5
    for signed in (error, error * np.sign(x)):  # towards +inf, and away from 0
        assert abs(signed.mean()) < 4 * signed.std() / count
    assert 0.01 < error.std() < 0.03


@pytest.mark.parametrize("impl", IMPLS)
def test_rounding_has_no_bias(impl):
    check_bias(run(impl))


# ------------------------------------------------------------------ planted bugs


def _broken(power=None, floor=quant.MIN_AMAX, clip=True, cast="nearest", per_row=False, flip=False):
    """The quantizer written again with one thing wrong."""

    def op(x, recipe):
        x = x.astype(jnp.float32)
        t, k = x.shape
        bk = k if per_row else recipe.block[1]
        tiles = jnp.pad(x, ((0, 0), (0, -k % bk))).reshape(t, -1, bk)
        scale = jnp.maximum(jnp.abs(tiles).max(-1), floor) / 448
        if recipe.ue8m0:
            scale = jnp.exp2((power or jnp.ceil)(jnp.log2(scale)))
        scaled = x / scale.repeat(bk, 1)[:, :k]
        if cast != "nearest":  # keep 3 mantissa bits: towards 0, or always up
            m, e = jnp.frexp(scaled)
            scaled = jnp.ldexp((jnp.trunc if cast == "zero" else jnp.ceil)(m * 16) / 16, e)
        scaled = scaled.clip(-448, 448) if clip else scaled
        scale = scale.repeat(-(-k // 128), 1) if per_row else scale
        values = scaled.astype(jnp.float8_e4m3fn)
        return QTensor(values, 1 / scale if flip else scale, (1, min(128, recipe.block[1])), "e4m3")

    return op


BUGS = {
    "ue8m0 to the nearest power": ("ue8m0", {"power": jnp.round}),
    "ue8m0 to the nearest power, no clip": ("ue8m0", {"power": jnp.round, "clip": False}),
    "ue8m0 rounded down": ("ue8m0", {"power": jnp.floor}),
    "no floor of amax": ("tile wide", {"floor": 0.0}),
    "one scale for the row": ("tile", {"per_row": True}),
    "scale is a divisor": ("tile", {"flip": True}),
    "rounds towards zero": ("tile", {"cast": "zero"}),
    "rounds up": ("tile", {"cast": "up"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    name, wrong = BUGS[bug]
    if "powers" not in name:
        check(_broken(), CASES["tile"])
    with pytest.raises(AssertionError):
        check(_broken(**wrong), CASES[name])


@pytest.mark.parametrize("cast", ["zero", "up"])
def test_bias_check_sees_directed_rounding(cast):
    check_bias(_broken())
    with pytest.raises(AssertionError):
        check_bias(_broken(cast=cast))
