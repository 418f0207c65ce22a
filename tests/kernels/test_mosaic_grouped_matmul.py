"""The Hopper kernels of `grouped_matmul`: bugs the suite sees, lowering for CUDA, runs on a GPU.

`test_grouped_matmul.py` interprets them on the same cases as every other implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import QTensor, hopper
from pallas_kernels.grouped_matmul import (
    api,
    block,
    cases,
    mosaic_sm90_fp8,
    mosaic_sm90_w4a8,
    packed_int4,
    products,
    ring,
    rows,
)
from pallas_kernels.grouped_matmul.tiles import Tiles, fp8_tiles, w4a8_tiles
from pallas_kernels.select import H100_SMS, choose, no_hopper
from pallas_kernels.testing.interpret import RaceError
from tests.kernels.grouped_matmul_suite import check, expected, has, interpreted, run

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
full = pytest.mark.full

SMALL = cases.Case(
    name="hopper small",
    rows=21,
    padding=9,
    experts=3,
    lead=(128,),
    k=512,
    load="skewed",
    weight="e4m3",
    x="tile",
    dtype="bfloat16",
)
PACKED = dataclasses.replace(SMALL, name="packed small", weight="int4", packed=True, x="token")
WIDE = dataclasses.replace(SMALL, name="wide", rows=500, padding=40, lead=(2, 256))
"""Many rows and outputs: thread blocks in clusters."""
FEW = Tiles(rows=8, deep=2, stages=2)
CLUSTERS = Tiles(rows=128, together=2, stages=2, cluster=2)


# ------------------------------------------------------------------ planted bugs


def _work(change):
    """A list of work with something changed."""
    make = rows.share_out

    def changed(*args, **kwargs):
        return change(make(*args, **kwargs))

    return rows, "share_out", changed


def _unit_scales(self, warpgroup, slot, index):
    count = self.g.tiles.rows if self.weights_left else 64
    layout = hopper.MATRIX.reduce(0 if self.weights_left else 1)
    return mosaic_sm90_fp8.plgpu.layout_cast(jnp.ones((count,), jnp.float32), layout)


def _from_the_first(staged, out, first, begin, end, copy=block._copy_rows):
    copy(staged, out, first, jnp.zeros_like(begin), end)


def _whole_tiles(staged, out, first, begin, end, copy=block._copy_rows):
    copy(staged, out, first, begin, jnp.full_like(end, staged.shape[0]))


BUGS = {
    "scales of rows left out": (mosaic_sm90_fp8.Fp8Block, "_row_scales", _unit_scales),
    "last inputs left out": (
        block.Geometry,
        "loads",
        property(lambda g: g.inputs // 128 // g.tiles.deep - 1),
    ),
    "rows before are stored": (block, "_copy_rows", _from_the_first),
    "rows after are stored": (block, "_copy_rows", _whole_tiles),
    "rows past the groups left": _work(
        lambda work: dataclasses.replace(work, counts=work.counts.at[0].set(work.counts[1]))
    ),
    "the expert before": _work(
        lambda work: dataclasses.replace(work, tiles=work.tiles.at[1, 0].add(-1))
    ),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(has(monkeypatch, mosaic_sm90_fp8, *BUGS[bug], tiles=FEW, sms=1), SMALL)


def _unsigned(words, full_range):
    first, second = packed_int4.as_e4m3(words, full_range)
    return first & 0x7F7F7F7F, second


def _halves_swapped(words, full_range):
    return packed_int4.as_e4m3(words, full_range)[::-1]


PACKED_BUGS = {
    "negative weights made positive": (mosaic_sm90_w4a8, "as_e4m3", _unsigned),
    "inputs in another order": (mosaic_sm90_w4a8, "as_e4m3", _halves_swapped),
    "scales of weights left out": (
        products,
        "add_scaled",
        lambda sums, product, *_, **__: sums + product,
    ),
    "scales of rows of another tile": (
        mosaic_sm90_w4a8.W4A8Block,
        "_row_scales_from",
        lambda self, row: self.refs.x_scales.at[pl.ds(0 * row, 32)],
    ),
    "the first weights of an item twice": (
        mosaic_sm90_w4a8.W4A8Block,
        "_weights",
        lambda self, warpgroup, slot, block: _weights(self, warpgroup, slot, 0),
    ),
}
_weights = mosaic_sm90_w4a8.W4A8Block._weights


@on_cpu
@pytest.mark.parametrize("bug", PACKED_BUGS)
def test_suite_sees_in_packed(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(has(monkeypatch, mosaic_sm90_w4a8, *PACKED_BUGS[bug], tiles=FEW, sms=1), PACKED)


RACES = {
    "loads do not wait for products": (ring, "order_before_copies", lambda _: None),
    "results are stored before they are there": (block.plgpu, "commit_smem", lambda: None),
}


@on_cpu
@pytest.mark.parametrize(
    ("kernel", "case"), [(mosaic_sm90_fp8, SMALL), (mosaic_sm90_w4a8, PACKED)], ids=["fp8", "w4a8"]
)
@pytest.mark.parametrize("race", RACES)
def test_race_detector_sees(race, kernel, case, monkeypatch):
    with pytest.raises(RaceError):
        check(has(monkeypatch, kernel, *RACES[race], tiles=FEW, sms=1), case)


# ------------------------------------------------------------------ arguments and choices


@on_cpu
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
def test_nobody_reads_the_weights_of_idle_experts(case):
    args, _ = expected(case)
    busy = jnp.asarray([13, 0, 8])
    w = args["w"]
    scales = w.scales.at[1].set(jnp.nan)
    clean = args | {"group_sizes": busy}
    poisoned = clean | {"w": dataclasses.replace(w, scales=scales)}
    op = interpreted(tiles=FEW)
    np.testing.assert_array_equal(op(**poisoned), op(**clean))


@on_cpu
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(rows=128, together=2, stages=3),
        Tiles(rows=16, deep=1, stages=3),
        Tiles(rows=64, deep=2, stages=2, auto_barriers=False),
        pytest.param(Tiles(rows=32, deep=2, together=2, stages=2), marks=full),
        pytest.param(Tiles(rows=128, stages=2), marks=full),
    ],
    ids=str,
)
def test_tiles_do_not_change_results(tiles):
    check(interpreted(tiles=tiles), SMALL)


@on_cpu
@pytest.mark.devices(8)  # six warpgroups at the same time
@pytest.mark.parametrize("rows", [500, pytest.param(1, marks=full)])
def test_clusters_do_not_change_results(rows):
    check(interpreted(tiles=CLUSTERS, sms=5), dataclasses.replace(WIDE, rows=rows))


def _outputs_of_the_first(self, order, item=block.Block.item):
    tile, outputs = item(self, order)
    return tile, outputs // 2 * 2


@on_cpu
@pytest.mark.devices(8)
def test_suite_sees_a_cluster_that_does_the_same_work_twice(monkeypatch):
    bug = block.Block, "item", _outputs_of_the_first
    with pytest.raises(AssertionError):
        check(has(monkeypatch, mosaic_sm90_fp8, *bug, tiles=CLUSTERS, sms=2), WIDE)


def test_many_rows_and_outputs_take_clusters():
    args = WIDE.abstract()
    assert mosaic_sm90_fp8.usual_tiles(args["x"], args["w"]).cluster == 2
    narrow = SMALL.abstract()
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct((4096, *a.shape[1:]), a.dtype), narrow["x"])
    assert mosaic_sm90_fp8.usual_tiles(x, narrow["w"]).cluster == 1


def test_a_cluster_needs_outputs_for_all():
    args = SMALL.abstract()
    op = functools.partial(mosaic_sm90_fp8.grouped_matmul, tiles=Tiles(rows=128, cluster=2), sms=2)
    with pytest.raises(ValueError, match=r"outputs=128 must be a multiple of 256.*cluster=2"):
        jax.eval_shape(op, **args)


def test_int4_has_no_clusters():
    args = PACKED.abstract()
    op = functools.partial(mosaic_sm90_w4a8.grouped_matmul, tiles=CLUSTERS, sms=2)
    args["w"] = dataclasses.replace(PACKED, lead=(2, 256)).abstract()["w"]
    with pytest.raises(ValueError, match="w4a8_128: tiles.cluster=2 must be 1"):
        jax.eval_shape(op, **args)


@on_cpu
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(rows=128, together=2, stages=3),
        Tiles(rows=16, stages=2, auto_barriers=False),
        pytest.param(Tiles(rows=32, deep=2, together=2, stages=2), marks=full),
        pytest.param(Tiles(rows=64, deep=4, stages=2), marks=full),
    ],
    ids=str,
)
def test_tiles_do_not_change_results_of_packed(tiles):
    check(interpreted(tiles=tiles), PACKED)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"x": "array"}, "needs x and w both quantized, or neither"),
        ({"weight": "array"}, "needs x and w both quantized, or neither"),
        ({"x": "token"}, "of x and .* of w, not .'e4m3', .1, 512.., .'e4m3', .128, 128.."),
        ({"weight": "int4"}, "not .*'int4', .1, 128..; int4 w must be packed, see `pack`"),
        ({"lead": (2, 64)}, "multiples of 128 outputs and inputs, not 64 and 512"),
        ({"k": 320}, "not 128 and 320"),
        ({"rows": 0, "padding": 0, "load": "none"}, "needs rows and experts, not 0 and 3"),
    ],
)
def test_refusals_name_what_is_needed(sizes, reason):
    refused(dataclasses.replace(SMALL, **sizes), reason)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"x": "array"}, "needs x and w both quantized, or neither"),
        ({"x": "tile"}, "'e4m3', .1, 512.. of x where w is packed int4, not .'e4m3', .1, 128"),
        ({"lead": (3, 64)}, "a multiple of 128 outputs, not 192"),
        ({"rows": 0, "padding": 0, "load": "none"}, "needs rows and experts, not 0 and 3"),
    ],
)
def test_refusals_of_packed_name_what_is_needed(sizes, reason):
    refused(dataclasses.replace(PACKED, **sizes), reason)


def refused(case, reason):
    args = case.make(0)
    refusal = api.hopper_refusal(args["x"], args["w"])
    assert refusal is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal)


def test_refuses_scales_of_another_type():
    args = SMALL.abstract()
    x = args["x"]
    half = jax.ShapeDtypeStruct(x.scales.shape, jnp.bfloat16)
    refusal = api.hopper_refusal(QTensor(x.values, half, x.block, x.format), args["w"])
    assert refusal == "needs float32 scales, not bfloat16 and float32"


@on_cpu
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
def test_a_cpu_never_runs_it(case):
    args = case.make(0)
    assert api.hopper_refusal(args["x"], args["w"]) is None
    with pytest.raises(NotImplementedError, match="mosaic_sm90.*needs an H100 or H200"):
        choose("grouped_matmul", "mosaic_sm90", api.IMPLEMENTATIONS, *args.values())
    chosen = choose("grouped_matmul", "auto", api.IMPLEMENTATIONS, *args.values())
    assert chosen is next(i.run for i in api.IMPLEMENTATIONS if i.name == "reference")


@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
def test_a_hopper_takes_it(case, monkeypatch):
    monkeypatch.setattr(api, "no_hopper", lambda: None)
    chosen = choose("grouped_matmul", "auto", api.IMPLEMENTATIONS, *case.abstract().values())
    assert chosen is api._mosaic_sm90


def test_each_format_has_its_kernel():
    assert api.hopper_kernel(SMALL.abstract()["w"]) is mosaic_sm90_fp8
    assert api.hopper_kernel(PACKED.abstract()["w"]) is mosaic_sm90_w4a8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 48}, "self.rows=48 must be 8, 16, 32, 64 or 128"),
        ({"rows": 8, "together": 3, "stages": 1}, "self.stages=1 must be at least 2 with self.t"),
        ({"rows": 64, "cluster": 2}, "self.cluster=2 must be 1 with self.rows=64"),
        ({"rows": 8, "registers": (40, 240)}, r"\(40, 240\) must be.*at most 504"),
        ({"rows": 8, "registers": (44, 160)}, "multiples of 8"),
    ],
)
def test_tiles_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**sizes)


@pytest.mark.parametrize("choose_tiles", [fp8_tiles, lambda *sizes: w4a8_tiles(*sizes[:3])])
@pytest.mark.parametrize(("mean", "rows"), [(0.3, 8), (2, 8), (4, 16), (8, 16), (16, 32), (32, 32)])
def test_most_experts_fit_in_a_tile_wherever_they_begin(choose_tiles, mean, rows):
    assert choose_tiles(round(mean * 256), 256, 56, 4096).rows == rows


# ------------------------------------------------------------------ lowering for CUDA


def _kernel(case):
    """Which kernel a case takes, and its tiles; sizes are but numbers in it."""
    found = []

    def ask(x, w, group_sizes):
        kernel = api.hopper_kernel(w)
        found.append((kernel, kernel.usual_tiles(x, w)))

    jax.eval_shape(ask, **case.abstract())
    return found[0]


FIRST = {_kernel(case): case for case in reversed(cases.BENCH)}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if FIRST[_kernel(c)] is c else full) for c in cases.BENCH],
    ids=str,
)
def test_lowers_for_cuda(case):
    args = case.abstract()
    op = functools.partial(api.hopper_kernel(args["w"]).grouped_matmul, sms=H100_SMS)
    lowered = jax.jit(op).trace(*args.values()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*cases.CI, SMALL, PACKED, WIDE], ids=str)
def test_matches_oracle_on_a_gpu(case):
    if reason := no_hopper():
        pytest.skip(reason)
    check(run("mosaic_sm90"), case)
