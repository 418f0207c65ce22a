"""`permute` and `combine`: copies exactly, sums within fp32, places that lead nowhere, bugs the
suite sees, lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import quant
from pallas_kernels.moe_permute import (
    api,
    cases,
    combine,
    permute,
    places_by_expert,
    reference,
    triton,
)
from pallas_kernels.select import choose, no_ada
from pallas_kernels.testing import assert_close, assert_equal, call, distinct
from pallas_kernels.testing.lower import lower_for_h100
from pallas_kernels.triton_quant import quantise_tiles
from tests.oracles import formats
from tests.tolerances import OP, SCALE_ULPS

IMPLS = distinct(api.PERMUTE)
CASES = {case.name: case for case in cases.CASES}
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")


def run(op, impl):
    if impl == "triton" and jax.default_backend() == "cpu":
        return lambda **args: call(getattr(triton, op.__name__), args | {"interpret": True})
    return lambda **args: call(op, args | {"impl": impl})


def check_permute(op, case, seed=0):
    """Each copy of each token, except of the last, which is NaN."""
    args = case.make(seed, poison=True)
    recipe = args["recipe"]
    x = np.asarray(args["x"]).astype(np.float32)
    if args["channel_scale"] is not None:
        x *= np.asarray(args["channel_scale"])
    q = op(**args)
    block = 128 if recipe.block[1] else case.width
    assert q.block == (1, block) and q.values.dtype == jnp.float8_e4m3fn
    assert q.values.shape == (case.num_rows, case.width)
    codes, scales = np.asarray(q.values).view(np.uint8), np.asarray(q.scales)
    amax = np.float64(formats.block_amax(x[:-1], (1, block), recipe.floor))
    for t, row in enumerate(np.asarray(args["places"])[:-1]):
        for place in row[(0 <= row) & (row < case.num_rows)]:
            if recipe.ue8m0:
                want = np.vectorize(formats.power_above)(amax[t] / 448).astype(np.float32)
                assert_equal(scales[place], want, f"scales of {t}")
            else:
                ulps = np.abs(scales[place] - amax[t] / 448) / np.spacing(scales[place])
                assert ulps.max() <= SCALE_ULPS, f"scales of {t} are {ulps.max()} ulps off"
            wide = scales[place].repeat(block)[: case.width]
            assert_equal(codes[place], formats.to_e4m3(x[t] / wide), f"copy of {t} in {place}")


def check_combine(op, case, seed=0):
    args = case.make_combine(seed, poison=True)
    y, places, weights = (np.asarray(args[k]) for k in ("y", "places", "weights"))
    want = np.zeros((case.tokens, case.width))
    for t, row in enumerate(places):
        for k, place in enumerate(row):
            if 0 <= place < case.num_rows:
                want[t] += np.float64(weights[t, k]) * y[place].astype(np.float64)
    out = op(**args)
    assert out.dtype == args["y"].dtype
    assert_close(out, want, OP[case.dtype], "out")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check_permute(run(permute, impl), case)
    check_combine(run(combine, impl), case)


@on_cpu
@settings(max_examples=6)
@given(data=st.data())
def test_any_sizes(data):
    tokens = data.draw(st.integers(2, 9), "tokens")
    choices = data.draw(st.integers(1, 4), "choices")
    case = cases.Case(
        name="any",
        tokens=tokens,
        choices=choices,
        width=data.draw(st.integers(1, 1500), "width"),
        left_out=data.draw(st.integers(0, tokens * choices), "left out"),
        channel_scale=data.draw(st.booleans(), "channel_scale"),
    )
    check_permute(run(permute, "triton"), case)
    check_combine(run(combine, "triton"), case)


@on_cpu
def test_comes_back():
    """With weights that sum to 1, experts that do nothing give what quantization left of x."""
    case = CASES["left out"]
    args = case.make(3)
    q = run(permute, "triton")(**args)
    places = np.asarray(args["places"])
    is_there = (0 <= places) & (places < case.num_rows)
    weights = is_there / np.maximum(is_there.sum(axis=1, keepdims=True), 1)
    y = jnp.nan_to_num(quant.dequantise(q))
    out = run(combine, "triton")(
        y=y, places=args["places"], weights=jnp.asarray(weights, jnp.float32)
    )
    want = np.asarray(args["x"], np.float32) * is_there.any(axis=1)[:, None]
    np.testing.assert_allclose(out, want, rtol=2.0**-4, atol=1e-3)


# ------------------------------------------------------------------ places


def places_of(chosen, experts, rows):
    args = {"chosen": jnp.asarray(chosen, jnp.int32), "experts": experts, "rows": rows}
    return map(np.asarray, call(places_by_expert, args))


def check_places(chosen, experts):
    """A stable sort by expert; what past a number of rows has no room is not counted."""
    flat = chosen.reshape(-1)
    order = np.argsort(np.where(flat < 0, experts, flat), kind="stable")
    want = np.where(flat < 0, -1, np.argsort(order)).reshape(chosen.shape)
    counts = np.bincount(flat[flat >= 0], minlength=experts)
    places, sizes = places_of(chosen, experts, chosen.size)
    assert_equal(places, want.astype(np.int32))
    assert_equal(sizes, counts.astype(np.int32))
    rows = counts.sum() // 2
    places, sizes = places_of(chosen, experts, int(rows))
    assert_equal(places, want.astype(np.int32))
    assert_equal(sizes.cumsum(dtype=np.int32), np.minimum(counts.cumsum(), rows).astype(np.int32))


@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 1), (7, 3, 5), (700, 4, 9)])
def test_places_are_those_of_a_stable_sort(tokens, choices, experts):
    rng = np.random.default_rng(tokens)
    check_places(rng.integers(-1, experts, (tokens, choices)), experts)


@pytest.mark.parametrize("expert", [-1, 2])
def test_places_where_all_choose_alike(expert):
    check_places(np.full((9, 2), expert), 4)


# ------------------------------------------------------------------ planted bugs


def has(name, replacement):
    def op(kernel, monkeypatch):
        monkeypatch.setattr(triton, name, replacement)
        return lambda **args: kernel(**args, interpret=True)

    return op


def edits(change):
    return lambda kernel, _: lambda **args: kernel(**change(args), interpret=True)


def _rolled(args):
    return args | {"places": jnp.roll(args["places"], 1, axis=1)}


def _kept(args):
    return args | {"places": jnp.abs(args["places"])}


def _with_scales_turned(*args):
    values, scales = quantise_tiles(*args)
    return values, scales[::-1]


permute_bugs = {
    "places of another token": edits(lambda a: a | {"places": jnp.roll(a["places"], 1, axis=0)}),
    "no channel scale": edits(lambda a: a | {"channel_scale": None}),
    "scales of another tile": has("quantise_tiles", _with_scales_turned),
    "a scale per row": edits(lambda a: a | {"recipe": quant.FP8_TOKEN}),
}
combine_bugs = {
    "weights of another choice": edits(_rolled),
    "negative places count": edits(_kept),
    "results left out": edits(lambda a: a | {"weights": a["weights"].at[:, -1].set(0)}),
}


@on_cpu
@pytest.mark.parametrize("bug", permute_bugs)
def test_suite_sees(bug, monkeypatch):
    with pytest.raises((AssertionError, ValueError)):
        check_permute(permute_bugs[bug](triton.permute, monkeypatch), CASES["scaled"])


@on_cpu
@pytest.mark.parametrize("bug", combine_bugs)
def test_suite_sees_in_combine(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check_combine(combine_bugs[bug](triton.combine, monkeypatch), CASES["left out"])


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("sizes", "recipe", "reason"),
    [
        ({}, quant.FP8_TENSOR, "needs a scale per 1x128 or per row"),
        ({"width": 16385}, quant.FP8_TOKEN, "at most 16384 for a scale per row, not 16385"),
        ({"choices": 40}, quant.FP8_TILE, "1 to 32 choices a row, not 5, 256 and 40"),
        ({"tokens": 40000, "width": 65536}, quant.FP8_TILE, "fewer than 2147483648 elements"),
        ({"rows": 2**25}, quant.FP8_TILE, "fewer than 2147483648 elements"),
    ],
)
def test_refusals_name_what_is_needed(sizes, recipe, reason):
    case = dataclasses.replace(CASES["plain"], **sizes)
    found = []

    def ask(*args):
        found.append(api.permute_refusal(*args, rows=case.num_rows, recipe=recipe))

    jax.eval_shape(ask, *case.abstract().values())
    assert reason in str(found[0])


def test_combine_refuses_too_many_choices():
    y, places = jnp.zeros((4, 8)), jnp.zeros((1, 33), jnp.int32)
    assert "1 to 32 choices a row, not 1, 8 and 33" in str(api.combine_refusal(y, places))


def test_only_e4m3_recipes_are_taken():
    args = CASES["plain"].make(0) | {"recipe": quant.INT4_GROUP}
    with pytest.raises(ValueError, match="not 'int4'"):
        permute(**args)


@on_cpu
def test_a_cpu_never_runs_it():
    args, back = CASES["plain"].make(0), CASES["plain"].make_combine(0)
    with pytest.raises(NotImplementedError, match="permute.*triton.*needs an NVIDIA GPU"):
        permute(**args, impl="triton")
    with pytest.raises(NotImplementedError, match="combine.*triton.*needs an NVIDIA GPU"):
        combine(**back, impl="triton")
    arrays = [args.pop(k) for k in ("x", "places", "channel_scale")]
    assert choose("permute", "auto", api.PERMUTE, *arrays, **args) is reference.permute
    assert choose("combine", "auto", api.COMBINE, *back.values()) is reference.combine


# ------------------------------------------------------------------ lowering for CUDA


@pytest.mark.parametrize("case", cases.BENCH, ids=str)
def test_lowers_for_cuda(case):
    options = {"rows": case.num_rows, "recipe": cases.RECIPES[case.quant]}
    shapes = case.abstract()
    text = lower_for_h100(functools.partial(triton.permute, **options), **shapes)
    assert text.count("xla.gpu.triton") == 1
    shape = jax.ShapeDtypeStruct
    y = shape((case.num_rows, case.width), case.dtype)
    weights = shape(shapes["places"].shape, jnp.float32)
    text = lower_for_h100(triton.combine, y, shapes["places"], weights)
    assert text.count("xla.gpu.triton") == 1


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CI + cases.FULL, ids=str)
def test_matches_oracle_on_a_gpu(case):
    if reason := no_ada():
        pytest.skip(reason)
    check_permute(run(permute, "triton"), case)
    check_combine(run(combine, "triton"), case)
