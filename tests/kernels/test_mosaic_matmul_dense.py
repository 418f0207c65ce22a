"""`matmul` for Hopper: rows in e4m3 against an oracle that rounds as it does, gradients, bugs the
suite sees, lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import QTensor, act_quant, matmul, quantise
from pallas_kernels.act_quant import triton
from pallas_kernels.grouped_matmul import block, mosaic_sm90_fp8, ring
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.matmul import api, cases, mosaic_sm90, xla
from pallas_kernels.matmul.tiles import Cut, usual_cut
from pallas_kernels.quant import FP8_TILE
from pallas_kernels.select import H100_SMS, choose, no_hopper
from pallas_kernels.testing import assert_close, assert_equal, call, jit
from pallas_kernels.testing.interpret import PARAMETERS, RaceError, interpret
from pallas_kernels.testing.lower import lower_for_h100
from tests.kernels.expert_mlp_suite import real
from tests.tolerances import E4M3_ROWS, OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
full = pytest.mark.full
CASES = {case.name: case for case in cases.CASES}
SMALL = CASES["hopper one row"]
MANY = CASES["hopper many rows"]
SMS = 3
"""Of the interpreted GPU: few, so that a thread block has several items."""
FEW = Cut(tiles=Tiles(rows=8, deep=2, stages=2), splits=2)
WIDE = Cut(tiles=Tiles(rows=128, stages=2), splits=2)
NARROW = Cut(tiles=Tiles(rows=128, outputs=64, stages=2, staged=1), splits=2)


def interpreted(**options):
    def op(x, w):
        keywords = {"sms": SMS, "interpret": PARAMETERS} | options
        return interpret(mosaic_sm90.matmul, x, w, **keywords)

    return op


def on_gpu(**args):
    return call(matmul, args | {"impl": "mosaic_sm90"})


@functools.cache
def expected(case):
    """Arguments with rows of zeros and of other sizes; results for rows in e4m3, and as they are;
    the size of a row. Which way ties go in e4m3 is up to `act_quant`.
    """
    args = case.make(0)
    x = np.float64(args["x"]).reshape(-1, case.k)
    sizes = 2.0 ** (np.arange(len(x)) % 7 - 3)
    sizes[1::3] = 0
    x *= sizes[:, None]
    args["x"] = jnp.asarray(x.reshape(args["x"].shape), args["x"].dtype)
    e4m3 = real(call(act_quant, {"x": args["x"]})).reshape(x.shape)
    w = real(args["w"]).reshape(-1, case.k)
    shape = (*case.tokens, *case.lead)
    wants = [(rows @ w.T).reshape(shape) for rows in (e4m3, x)]
    return args, *wants, np.maximum(sizes, 1).reshape(*case.tokens, *(1,) * len(case.lead))


def check(op, case):
    args, rounded, plain, sizes = expected(case)
    out = op(**args)
    assert out.dtype == jnp.bfloat16
    out = np.float64(out) / sizes
    assert_close(out, rounded / sizes, OP["bfloat16"])
    assert_close(out, plain / sizes, E4M3_ROWS)


@on_cpu
@pytest.mark.parametrize("case", cases.HOPPER, ids=str)
def test_matches_oracles(case):
    check(interpreted(), case)


@on_cpu
@pytest.mark.parametrize(
    ("case", "cut"),
    [
        (SMALL, FEW),
        pytest.param(SMALL, Cut(tiles=Tiles(rows=8, stages=3), splits=4), marks=full),
        (MANY, NARROW),
        (dataclasses.replace(MANY, name="even", lead=(256,)), WIDE),
        pytest.param(SMALL, Cut(tiles=Tiles(rows=16, deep=2, together=2, stages=2)), marks=full),
        pytest.param(MANY, Cut(tiles=Tiles(rows=64, stages=3), splits=2), marks=full),
        pytest.param(MANY, Cut(tiles=Tiles(rows=32, stages=3)), marks=full),
    ],
    ids=str,
)
def test_cuts_do_not_change_results(case, cut):
    check(interpreted(cut=cut), case)


@on_cpu
@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])  # each is compiled: not shrunk
@given(
    rows=st.integers(1, 140),
    outputs=st.integers(2, 4),
    blocks=st.sampled_from([1, 2, 3, 4]),
    sms=st.integers(1, 200),
)
def test_any_shape(rows, outputs, blocks, sms):
    case = cases.Case(
        name=f"{rows} {outputs} {blocks}",
        tokens=(rows,),
        lead=(64 * outputs,),
        k=128 * blocks,
        weight="e4m3",
        dtype="bfloat16",
    )
    check(interpreted(sms=sms), case)


@on_cpu
def test_rows_are_quantised_as_act_quant_does():
    x = CASES["hopper few rows"].make(0)["x"].reshape(18, 384).at[4].set(0)
    values, scales = triton.quantise_by_column(x, FP8_TILE, rows=32, scale_rows=36, interpret=True)
    want = call(quantise, {"x": x, "recipe": FP8_TILE})
    assert values.shape == (32, 384) and scales.shape == (3, 36)
    assert_equal(values[:18], want.values)
    assert_equal(scales[:, :18], want.scales.T)


@on_cpu
@pytest.mark.parametrize(
    "cut", [FEW, pytest.param(NARROW, marks=full)], ids=lambda cut: str(cut.tiles.rows)
)
def test_rows_that_fill_up_a_tile_may_hold_nan(cut, monkeypatch):
    def poisoned(x, *args, **kwargs):
        values, scales = prepare(x, *args, **kwargs)
        rows = x.shape[0]
        return values.at[rows:].set(jnp.nan), scales.at[:, rows:].set(jnp.nan)

    prepare = mosaic_sm90.prepare
    monkeypatch.setattr(mosaic_sm90, "prepare", poisoned)
    check(interpreted(cut=cut), SMALL if cut is FEW else MANY)


def test_splits_are_added_in_order():
    """The same bits every time, and those of an fp32 sum from the first split on."""
    args = dataclasses.replace(SMALL, tokens=(128,)).abstract()
    g = mosaic_sm90.geometry(128, args["w"], NARROW, H100_SMS, None)
    parts = np.random.default_rng(0).normal(size=(2, 128, 192)).astype(np.float32)
    parts[1] *= 1e3
    got = mosaic_sm90.add_splits(jnp.asarray(parts), g)
    assert_equal(got, (parts[0] + parts[1]).astype(jnp.bfloat16))
    few = mosaic_sm90.geometry(1, args["w"], FEW, H100_SMS, None)
    got = mosaic_sm90.add_splits(jnp.asarray(parts.swapaxes(1, 2)[..., :8]), few)
    assert_equal(got, (parts[0] + parts[1]).astype(jnp.bfloat16)[:8])


# ------------------------------------------------------------------ gradients


def _gradient(op, x, w):
    slopes = np.random.default_rng(1).standard_normal((*x.shape[:-1], *w.shape[:-1]), np.float32)
    return jax.grad(lambda x: jnp.sum(slopes * op(x, w).astype(jnp.float32)))(x)


@on_cpu
def test_gradient_of_rows_is_that_of_plain_jax():
    args = SMALL.make(0)
    got = interpret(_gradient, functools.partial(mosaic_sm90.matmul, **HOW), **args)
    want = _gradient(xla.matmul, **args)
    assert_equal(got, want)


HOW = {"cut": FEW, "sms": SMS, "interpret": PARAMETERS}


def test_weights_have_no_gradient():
    args = SMALL.make(0)

    def loss(scales):
        w = args["w"]
        w = QTensor(w.values, scales, w.block, w.format)
        return jnp.sum(mosaic_sm90.matmul(args["x"], w, **HOW).astype(jnp.float32))

    with pytest.raises(NotImplementedError, match="matmul: quantized weights have no gradient"):
        jax.grad(loss)(args["w"].scales)


# ------------------------------------------------------------------ planted bugs


def _first_scales(self, expert):
    return 0, 0 * expert


def _at_the_first(self, outputs):
    return 0 * outputs


BUGS = {
    "every split takes the first inputs": (mosaic_sm90.DenseBlock, "inputs_of", _first_scales),
    "later outputs are left out": (mosaic_sm90.DenseBlock, "first_output", _at_the_first),
    "a split is forgotten": (
        mosaic_sm90.DenseBlock,
        "counts",
        lambda self: (self.g.row_tiles, self.g.row_tiles),
    ),
    "the first split twice": (
        mosaic_sm90,
        "add_splits",
        lambda out, g: (2 * out[0]).astype(jnp.bfloat16).T,
    ),
    "scales of rows left out": (
        mosaic_sm90,
        "prepare",
        lambda x, g: (lambda values, scales: (values, 0 * scales + 1))(*_prepare(x, g)),
    ),
}
_prepare = mosaic_sm90.prepare


def has(monkeypatch, where, name, replacement, **options):
    """The op, interpreted, with something replaced."""
    monkeypatch.setattr(where, name, replacement)
    run = mosaic_sm90._run.__wrapped__
    # Traced again, with the bug and without.
    monkeypatch.setattr(mosaic_sm90, "_run", jax.jit(lambda *a: run(*a), static_argnums=4))
    return interpreted(**options)


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(has(monkeypatch, *BUGS[bug], cut=FEW, sms=1), SMALL)


RACES = {
    "loads do not wait for products": (ring, "order_before_copies", lambda _: None),
    "results are stored before they are there": (block.plgpu, "commit_smem", lambda: None),
}


@on_cpu
@pytest.mark.parametrize("race", RACES)
def test_race_detector_sees(race, monkeypatch):
    with pytest.raises(RaceError):
        check(has(monkeypatch, *RACES[race], cut=FEW, sms=1), SMALL)


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": "array"}, "needs w with .*'e4m3', .128, 128.*, not an array"),
        ({"weight": "int4"}, "not .'int4', .1, 128"),
        ({"dtype": "float32"}, "needs bfloat16 x and float32 scales, not float32 and float32"),
        ({"lead": (96,)}, "multiple of 64 outputs, at least 128, and of 128 inputs, not 96"),
        ({"lead": (64,)}, "at least 128, .* not 64"),
        ({"lead": (2, 192)}, "multiple of 128 outputs, .* not 192 and 512"),
        ({"k": 320}, "not 192 and 320"),
        ({"tokens": (0,)}, r"needs rows, not x of \(0, 512\)"),
        ({"tokens": (2**22,)}, "needs arrays of fewer than 2147483648 elements"),
    ],
)
def test_refusals_name_what_is_needed(changes, reason):
    refusals = []
    case = dataclasses.replace(SMALL, **changes)
    jax.eval_shape(lambda **args: refusals.append(api.hopper_refusal(**args)), **case.abstract())
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusals[0])


@on_cpu
def test_a_cpu_never_runs_it():
    args = SMALL.make(0)
    with pytest.raises(NotImplementedError, match="matmul.*mosaic_sm90.*needs an H100 or H200"):
        matmul(**args, impl="mosaic_sm90")
    assert chosen(args) == "reference"


def test_a_hopper_takes_it_where_arrays_are_whole(monkeypatch):
    monkeypatch.setattr(api, "no_hopper", lambda: None)
    args = SMALL.make(0)
    if jax.device_count() > 1:
        assert chosen(args) != "mosaic_sm90"
    assert chosen(args, "mosaic_sm90") == "mosaic_sm90"
    alone = dataclasses.replace(api.IMPLEMENTATIONS[0], auto=lambda *_: None)
    monkeypatch.setattr(api, "IMPLEMENTATIONS", (alone, *api.IMPLEMENTATIONS[1:]))
    assert chosen(args) == "mosaic_sm90"
    assert chosen(dataclasses.replace(SMALL, weight="array").make(0)) != "mosaic_sm90"


def chosen(args, impl="auto"):
    run = choose("matmul", impl, api.IMPLEMENTATIONS, *args.values())
    return next(i.name for i in api.IMPLEMENTATIONS if i.run is run)


def test_cuts_that_do_not_fit_are_named():
    w = SMALL.abstract()["w"]
    with pytest.raises(ValueError, match="3 splits x 1 blocks do not divide 4"):
        mosaic_sm90.geometry(1, w, Cut(tiles=Tiles(rows=8), splits=3), H100_SMS, None)
    with pytest.raises(ValueError, match="items of 128 outputs do not divide 192"):
        mosaic_sm90.geometry(128, w, Cut(tiles=Tiles(rows=128)), H100_SMS, None)


@pytest.mark.parametrize("name", cases.DEEPSEEK_V3)
@pytest.mark.parametrize("rows", [1, 17, 64, 128, 256])
def test_most_of_the_device_is_busy_at_decode(name, rows):
    outputs, inputs = cases.DEEPSEEK_V3[name]
    cut = usual_cut(rows, outputs, inputs // 128, H100_SMS)
    assert cut.tiles.rows >= min(rows, 128)
    items = -(-rows // cut.tiles.rows) * -(-outputs // cut.tiles.outputs) * cut.splits
    assert items >= 0.5 * H100_SMS
    assert smem(cut) < 226 * 1024


def smem(cut):
    """Bytes: the ring with its scales, and what is staged."""
    tiles, scales = cut.tiles, 4 * mosaic_sm90_fp8.scale_rows(cut.tiles)
    ring = tiles.stages * tiles.deep * (128 * (tiles.rows + tiles.outputs) + scales)
    if tiles.rows < 128:
        return ring + 2 * 64 * tiles.rows * (4 if cut.splits > 1 else 2)
    return ring + 2 * tiles.staged * 64 * 128 * (2 if cut.splits > 1 else 1)


def test_more_rows_than_a_tile_have_several():
    w = SMALL.abstract()["w"]
    g = mosaic_sm90.geometry(130, w, None, H100_SMS, None)
    assert (g.rows, g.row_tiles) == (256, 2)
    assert g.thread_blocks == math.prod((g.row_tiles, g.items, g.splits))


# ------------------------------------------------------------------ lowering for CUDA


DECODE, REST = (
    [case for case in cases.BENCH if (case.tokens == (128,)) == decode] for decode in (True, False)
)


@pytest.mark.parametrize(
    "case", [*cases.HOPPER, *DECODE, *(pytest.param(case, marks=full) for case in REST)], ids=str
)
def test_lowers_for_cuda(case):
    text = lower_for_h100(functools.partial(mosaic_sm90.matmul, sms=H100_SMS), **case.abstract())
    assert text.count("mosaic_gpu_v2") == text.count("xla.gpu.triton") == 1


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.HOPPER, ids=str)
def test_matches_oracles_on_a_gpu(case):
    if reason := no_hopper():
        pytest.skip(reason)
    check(on_gpu, case)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "cut"),
    [(SMALL, FEW), (MANY, NARROW), (dataclasses.replace(MANY, name="even", lead=(256,)), WIDE)],
    ids=str,
)
def test_cuts_on_a_gpu(case, cut):
    if reason := no_hopper():
        pytest.skip(reason)
    check(jit(functools.partial(mosaic_sm90.matmul, cut=cut)), case)


@pytest.mark.gpu
def test_repeats_its_bits_on_a_gpu():
    if reason := no_hopper():
        pytest.skip(reason)
    args, run = CASES["deepseek-v3 q_a t128"].make(0), jit(mosaic_sm90.matmul)
    first = run(**args)
    for _ in range(5):
        assert_equal(run(**args), first)
