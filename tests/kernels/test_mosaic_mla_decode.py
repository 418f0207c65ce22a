"""The Hopper kernel of `mla_decode`: bugs the suite sees, lowering for CUDA, and runs on a GPU.

`test_mla_decode.py` interprets it on the same cases as every other implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import plan_mla_decode
from pallas_kernels.mla_decode import (
    api,
    cases,
    mosaic_sm90,
    mosaic_sm90_fp8,
    mosaic_sm90_fp8_tensor,
    scores,
    values,
)
from pallas_kernels.mla_decode.plan import with_work
from pallas_kernels.mla_decode.tiles import Tiles
from pallas_kernels.select import H100_SMS, choose, no_hopper
from pallas_kernels.testing import assert_close, call
from pallas_kernels.testing.interpret import RaceError
from tests.kernels.mla_decode_suite import check, interpreted, partial_results, run
from tests.tolerances import E4M3_QUERIES, OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")

SMALL = cases.Case(
    name="hopper small",
    lens=(70, 0, 130),
    queries=(2,) * 3,
    uniform=True,
    heads=32,
    latent=128,
    rope=64,
    page_size=64,
    dtype="bfloat16",
    sharpness=3.0,
)
SHARP = dataclasses.replace(SMALL, name="hopper small sharp", sharpness=300.0)
"""Scores of a tile exceed those before by hundreds of exponents."""
TENSOR = dataclasses.replace(SMALL, name="hopper small fp8 tensor", latent=256, kv="fp8_tensor")


# ------------------------------------------------------------------ planted bugs


def sees(change):
    return lambda _: interpreted(see=change)


def has(module, name, replacement):
    def op(monkeypatch):
        monkeypatch.setattr(module, name, replacement)
        function = mosaic_sm90._run.__wrapped__  # traced again, with the bug and without
        run = jax.jit(lambda *args: function(*args), static_argnums=5)
        monkeypatch.setattr(mosaic_sm90, "_run", run)
        return interpreted()

    return op


full = pytest.mark.full


def _not_shrunk(b, even, out):
    values.plgpu.barrier_wait(b.signal("alpha", even))
    return out


BUGS = {
    "last page dropped": sees(lambda rows: np.where(rows > 64, rows - 64, rows)),
    "sees one row ahead": sees(lambda rows: rows + (rows > 0)),
    "not causal": sees(lambda rows: rows.reshape(-1, 2).max(axis=1).repeat(2)),
    "hidden rows keep NaN": has(values, "_clear_hidden", lambda *_: None),
    "hidden columns count": has(scores, "_mask", lambda scores, *_: scores),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(BUGS[bug](monkeypatch), SMALL)


@on_cpu
def test_suite_sees_older_results_not_shrunk(monkeypatch):
    with pytest.raises(AssertionError):
        check(has(values, "_shrink", _not_shrunk)(monkeypatch), SHARP)


@on_cpu
def test_maxima_may_lag_behind(monkeypatch):
    check(interpreted(), SHARP)
    with pytest.raises(AssertionError):
        check(has(scores, "LAG", 1e6)(monkeypatch), SHARP)


@on_cpu
def test_suite_sees_partial_results_left_alone(monkeypatch):
    op = has(mosaic_sm90, "combine", lambda g, out, lse, *_: (out, lse))(monkeypatch)
    with pytest.raises(AssertionError):
        check(op, SMALL)


ONE = dataclasses.replace(SMALL, name="hopper one", lens=(290,), queries=(2,))
"""A sequence of five tiles."""


@on_cpu
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_partial_results_are_combined(workers):
    assert partial_results(ONE, workers) == [workers]
    check(interpreted(sms=workers), ONE)


@pytest.mark.parametrize("kv", ["auto", "fp8", "fp8_tensor"])
def test_cases_have_partial_results(kv):
    """A list of work that never splits would leave the second kernel untested."""
    hopper = [c for c in cases.CI + cases.FULL if c.kv == kv and c.name.startswith("hopper")]
    assert any(partial_results(case) for case in hopper)


@full
@on_cpu
def test_suite_sees_scales_left_out(monkeypatch):
    op = has(mosaic_sm90_fp8.Fp8Block, "_scales", lambda *_: [scores.row_values(1.0)])(monkeypatch)
    with pytest.raises(AssertionError):
        check(op, dataclasses.replace(SMALL, name="hopper small fp8", kv="fp8"))


Tensor = mosaic_sm90_fp8_tensor.Fp8TensorBlock


def _first_group_only(self, half, step, group, load):
    if group == 0:
        _convert(self, half, step, group, load)


def _never_clipped(self, index, source, largest):
    return _rounded(self, index, source, largest / 2)


_convert, _rounded = Tensor._convert, Tensor._rounded
TENSOR_BUGS = {
    "hidden rows keep NaN": has(values, "_clear_hidden", lambda *_: None),
    "scales of queries too small": has(Tensor, "_rounded", _never_clipped),
    "second group not converted": has(Tensor, "_convert", _first_group_only),
}


@on_cpu
@pytest.mark.parametrize("bug", TENSOR_BUGS)
def test_suite_sees_with_one_scale(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(TENSOR_BUGS[bug](monkeypatch), TENSOR)


@on_cpu
def test_suite_sees_the_scale_of_another_layer(monkeypatch):
    def change(args):
        scale = jnp.roll(args["cache"].scale, 1)
        return args | {"cache": dataclasses.replace(args["cache"], scale=scale)}

    op = interpreted()
    check(op, TENSOR)
    with pytest.raises(AssertionError):
        check(lambda **args: op(**change(args)), TENSOR)


@on_cpu
def test_queries_are_rounded_to_e4m3_by_row():
    """Cases have queries that e4m3 holds; of other ones, the error is that of the format."""
    args = TENSOR.make(0)
    rng = np.random.default_rng(1)
    for name in ("q_latent", "q_rope"):
        rows = rng.standard_normal(args[name].shape) * np.exp(rng.uniform(-3, 1, (6, 32, 1)))
        args[name] = jnp.asarray(rows, jnp.bfloat16)
    want = call(api.mla_decode, args | {"impl": "reference"})
    for got, expected, name in zip(interpreted()(**args), want, ("out", "lse"), strict=True):
        assert_close(got, expected, E4M3_QUERIES, name)


@on_cpu
def test_race_detector_sees_a_missing_fence(monkeypatch):
    op = has(scores.plgpu, "commit_smem", lambda: None)(monkeypatch)
    with pytest.raises(RaceError):
        check(op, SMALL)


# ------------------------------------------------------------------ arguments and choices


@on_cpu
def test_rows_may_be_hidden_one_by_one():
    """As in batches whose sequences have fewer real rows than the batch has room for."""
    shown = np.asarray([1, 0, 0, 0, 0, 1])
    hide = lambda rows: rows * shown  # noqa: E731
    args = SMALL.make(0, poison=True)
    for name in ("q_latent", "q_rope"):
        args[name] = jnp.where(shown[:, None, None] > 0, args[name], 1e4).astype("bfloat16")
    plan = dataclasses.replace(args["plan"], visible=hide(args["plan"].visible))
    want = call(api.mla_decode, args | {"plan": plan, "impl": "reference"})
    for got, expected in zip(interpreted(see=hide)(**args), want, strict=True):
        assert_close(got, expected, OP["bfloat16"])


@on_cpu
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(value_columns=64),
        pytest.param(Tiles(value_columns=256, auto_barriers=True), marks=full),
    ],
)
def test_tiles_do_not_change_results(tiles):
    case = dataclasses.replace(SMALL, name="hopper small wide", latent=256)
    args = case.make(0)
    for a, b in zip(interpreted()(**args), interpreted(tiles=tiles)(**args), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"heads": 24}, "needs 8, 16, 32 or a multiple of 64 heads, not 24"),
        ({"heads": 96}, "not 96"),
        ({"page_size": 16}, "needs pages of 64 tokens, not 16"),
        ({"latent": 192}, "in 128s, and 64 of rope, not 192 and 64"),
        ({"latent": 640}, "not 640"),
        ({"rope": 32}, "not 128 and 32"),
        (
            {"dtype": "float32", "kv": "fp8_tensor"},
            "bfloat16 queries and rope keys of float8_e4m3fn, not float32 and float8_e4m3fn",
        ),
        ({"dtype": "float32"}, "rope keys of bfloat16, not float32 and float32"),
    ],
)
def test_refusals_name_what_is_needed(sizes, reason):
    args = dataclasses.replace(SMALL, **sizes).make(0)
    refusal = api.hopper_refusal(args["q_latent"], args["q_rope"], args["cache"])
    assert refusal is not None and reason in refusal


def test_refuses_a_latent_of_another_type():
    args = SMALL.make(0)
    cache = dataclasses.replace(args["cache"], latent=args["cache"].latent.astype("int8"))
    refusal = api.hopper_refusal(args["q_latent"], args["q_rope"], cache)
    assert refusal is not None and "not int8" in refusal


@on_cpu
def test_a_cpu_never_runs_it():
    args = SMALL.make(0)
    found = [args[k] for k in ("q_latent", "q_rope", "cache", "layer", "page_table", "plan")]
    assert no_hopper() == "needs an H100 or H200"
    with pytest.raises(NotImplementedError, match="mosaic_sm90.*needs an H100 or H200"):
        choose("mla_decode", "mosaic_sm90", api.IMPLEMENTATIONS, *found)
    chosen = choose("mla_decode", "auto", api.IMPLEMENTATIONS, *found)
    assert chosen is next(i.run for i in api.IMPLEMENTATIONS if i.name == "reference")
    assert api.schedule_mla_decode(args["plan"], args["page_table"], 32) is args["plan"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"value_columns": 96}, "self.value_columns=96 must be 64, 128 or 256"),
        ({"registers": (192, 160)}, r"\(192, 160\) must be.*at most 504"),
        ({"registers": (180, 160)}, "multiples of 8"),
    ],
)
def test_tiles_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**sizes)


# ------------------------------------------------------------------ lowering for CUDA


def _kernel(case):
    """Which of the kernels a case takes; batch, length and queries are but numbers in them."""
    return case.heads, case.kv


# Of each the one with most queries a sequence.
QUICK = {_kernel(case): case for case in sorted(cases.BENCH, key=lambda case: case.queries[0])}


def lower(case):
    args = case.abstract()
    rows, heads = args["q_latent"].shape[:2]

    def planned(lens, starts, table):
        plan = plan_mla_decode(lens, starts, rows, queries=case.queries[0])
        return with_work(plan, table, heads, H100_SMS)

    lens, starts = args.pop("cached_lens"), args.pop("query_starts")
    plan = jax.eval_shape(planned, lens, starts, args["page_table"])
    run = functools.partial(mosaic_sm90.mla_decode, scale=case.scale)
    return jax.jit(run).trace(**args, plan=plan).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if QUICK[_kernel(c)] is c else full) for c in cases.BENCH],
    ids=str,
)
def test_lowers_for_cuda(case):
    assert lower(case).as_text().count("mosaic_gpu_v2") == 2


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CI + cases.FULL, ids=str)
def test_matches_oracle_on_a_gpu(case):
    if reason := no_hopper():
        pytest.skip(reason)
    check(run("mosaic_sm90"), case)
