"""The Triton kernel of `act_quant`: bits of the reference, bugs the suite sees, lowering for CUDA,
and runs on a GPU.

`test_act_quant.py` interprets it on the same cases as every other implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import act_quant, quant, quantise, triton_quant
from pallas_kernels.act_quant import api, cases, triton
from pallas_kernels.select import choose, no_ada
from pallas_kernels.testing import assert_equal, call
from pallas_kernels.testing.lower import lower_for_h100

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
CASES = [case for case in cases.CASES if case.quant != "tensor"]
SMALL = [case for case in CASES if "ci" in case.tags]


def interpreted(x, recipe, **options):
    return call(triton.act_quant, {"x": x, "recipe": recipe, "interpret": True, **options})


def same(got, want):
    assert (got.block, got.format) == (want.block, want.format)
    assert_equal(got.scales, want.scales, "scales")
    assert_equal(got.values, want.values, "values")


def halfway(rows=64):
    """Quotients halfway between two values of e4m3, exactly."""
    rng = np.random.default_rng(0)
    scale = rng.integers(2**18, 2**19, (rows, 1)).astype(np.float32) * np.float32(2.0**-20)
    halves = (rng.integers(8, 16, (rows, 128)) * 2 + 1) * 2.0 ** rng.integers(-8, 4, (rows, 128))
    x = (scale * halves * rng.choice([-1, 1], halves.shape)).astype(np.float32)
    x[:, :1] = 448 * scale * np.sign(x[:, :1])
    return jnp.asarray(x)


def reference(x, recipe):
    """On a CPU compiled like the interpreter: XLA multiplies with 1 / 448 in both."""
    if jax.default_backend() == "cpu":
        return call(quantise, {"x": x, "recipe": recipe})
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):  # one operation at a time: true divisions, as in the kernel
        return quantise(jax.device_put(x, cpu), recipe)


# ------------------------------------------------------------------ exactly the reference


@on_cpu
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_is_the_reference(case):
    args = case.make(1)
    same(interpreted(**args), reference(**args))


@on_cpu
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", [quant.FP8_TILE, quant.FP8_TOKEN])
def test_poison_stays_in_its_tile(recipe, poison):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 256)), jnp.float32)
    got, want = interpreted(x.at[2, 130].set(poison), recipe), reference(x, recipe)
    columns = slice(128 if recipe.block[1] else 256)
    for q in (got, want):
        assert (np.isnan(np.asarray(q.values[2, 130], np.float32))) == (q is got)
    assert np.isfinite(got.scales).all() == np.isnan(poison)
    for rows in (slice(2), slice(3, None)):
        assert_equal(got.values[rows], want.values[rows])
        assert_equal(got.scales[rows], want.scales[rows])
    if recipe.block[1]:
        assert_equal(got.values[2, columns], want.values[2, columns])


@on_cpu
@settings(max_examples=6)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 300)),
    recipe=st.sampled_from([quant.FP8_TILE, quant.FP8_TILE_UE8M0, quant.FP8_TOKEN]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_any_shape(shape, recipe, dtype):
    x = jnp.asarray(np.random.default_rng(shape[-1]).normal(size=shape), dtype)
    same(interpreted(x, recipe), reference(x, recipe))


@on_cpu
@pytest.mark.parametrize("tiles", [{"elements": 32}, {"elements": 512, "per_thread": 2}])
def test_tiles_do_not_change_results(tiles):
    args = CASES[1].make(0)
    got = triton.act_quant(**args, tiles=triton.Tiles(**tiles), interpret=True)
    same(got, reference(**args))


# ------------------------------------------------------------------ planted bugs


def _floored(x, recipe, interpret):
    return triton_quantise(x, dataclasses.replace(recipe, floor=recipe.floor * 10), interpret)


def _shared(x, recipe, interpret):
    values, scales = triton_quantise(x, recipe, interpret)
    return values, jnp.full_like(scales, scales[0])


triton_quantise = triton.quantise_tiles
BUGS = {
    "another floor": (1e-6, "tile", (triton, "quantise_tiles", _floored)),
    "the first tile's scale": (1, "tile", (triton, "quantise_tiles", _shared)),
    "sign counts in the maximum": (1, "tile", (triton_quant, "_MAGNITUDE", -1)),
    "powers of two rounded down": (1, "tile_ue8m0", (triton_quant, "_MANTISSA", 0)),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    factor, recipe, planted = BUGS[bug]
    args = {"x": factor * halfway(), "recipe": cases.RECIPES[recipe]}
    same(interpreted(**args), reference(**args))
    monkeypatch.setattr(*planted)
    with pytest.raises(AssertionError):
        same(triton.act_quant(**args, interpret=True), reference(**args))


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("columns", "recipe", "reason"),
    [
        (128, quant.FP8_TENSOR, "needs a scale per 1x128 or per token, not per (0, 0)"),
        (128, dataclasses.replace(quant.FP8_TILE, floor=0.0), "needs a floor"),
        (20000, quant.FP8_TOKEN, "at most 16384 for a scale per token, not 20000"),
        (0, quant.FP8_TILE, "at least one row"),
    ],
)
def test_refusals_name_what_is_needed(columns, recipe, reason):
    refusal = api.triton_refusal(jnp.zeros((1, columns)), recipe)
    assert refusal is not None and reason in refusal


@on_cpu
def test_a_cpu_never_runs_it():
    x = jnp.ones((1, 128))
    with pytest.raises(NotImplementedError, match="act_quant.*triton.*needs an NVIDIA GPU"):
        act_quant(x, impl="triton")
    assert choose("act_quant", "auto", api.IMPLEMENTATIONS, x, quant.FP8_TILE) is quantise


@pytest.mark.parametrize("sizes", [{"elements": 48}, {"per_thread": 0}])
def test_tiles_are_checked(sizes):
    with pytest.raises(ValueError, match="must be a power of two"):
        triton.Tiles(**sizes)


# ------------------------------------------------------------------ lowering for CUDA


@pytest.mark.parametrize("recipe", ["tile", "tile_ue8m0", "token"])
@pytest.mark.parametrize("case", cases.BENCH, ids=str)
def test_lowers_for_cuda(case, recipe):
    run = functools.partial(triton.act_quant, recipe=cases.RECIPES[recipe])
    text = lower_for_h100(run, jax.ShapeDtypeStruct(case.shape, case.dtype))
    assert text.count("xla.gpu.triton") == 1


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_reference_on_a_gpu(case):
    if reason := no_ada():
        pytest.skip(reason)
    args = case.make(0)
    same(call(act_quant, args | {"impl": "triton"}), reference(**args))


@pytest.mark.gpu
def test_halves_go_to_even_on_a_gpu():
    if reason := no_ada():
        pytest.skip(reason)
    args = {"x": halfway(4096), "recipe": quant.FP8_TILE}
    same(call(act_quant, args | {"impl": "triton"}), reference(**args))
