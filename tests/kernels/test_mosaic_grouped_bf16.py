"""`grouped_matmul` for Hopper of bf16 arrays and its gradients: interpreted with races detected,
bugs that the tests see, lowering for CUDA, runs on a GPU.

`test_grouped_matmul.py` interprets the product on the same cases as every other implementation.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import expert_mlp, grouped_matmul
from pallas_kernels.expert_mlp import api as experts_api
from pallas_kernels.grouped_matmul import (
    api,
    block,
    cases,
    mosaic_sm90_bf16,
    padded,
    weight_gradient,
)
from pallas_kernels.grouped_matmul.tiles import Tiles, bf16_tiles, weight_gradient_tiles
from pallas_kernels.select import H100_SMS, choose, no_hopper
from pallas_kernels.testing import assert_close
from pallas_kernels.testing.generate import group_sizes
from pallas_kernels.testing.interpret import PARAMETERS, RaceError, interpret
from pallas_kernels.testing.lower import lower_for_h100
from tests.kernels.grouped_matmul_suite import CASES, SMS, check, has, interpreted
from tests.tolerances import OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
full = pytest.mark.full

SMALL = cases.Case(
    name="bf16 small",
    rows=21,
    padding=9,
    experts=3,
    lead=(128,),
    k=256,
    load="skewed",
    dtype="bfloat16",
)
FEW = Tiles(rows=8, stages=2)
MANY = Tiles(rows=128, stages=3)


# ------------------------------------------------------------------ products


@on_cpu
@pytest.mark.parametrize(
    "tiles",
    [
        Tiles(rows=128, outputs=192, stages=3, staged=3, auto_barriers=False),
        Tiles(rows=64, deep=2, stages=2),
        pytest.param(Tiles(rows=128, outputs=256, deep=2, stages=2, staged=4), marks=full),
        pytest.param(Tiles(rows=16, deep=2, stages=4), marks=full),
        pytest.param(Tiles(rows=32, stages=3), marks=full),
    ],
    ids=str,
)
def test_tiles_do_not_change_results(tiles):
    check(interpreted(tiles=tiles), CASES["bf16 ragged"])


@on_cpu
@pytest.mark.parametrize("tiles", [FEW, pytest.param(MANY, marks=full)], ids=["few", "many"])
def test_nobody_reads_the_weights_of_idle_experts(tiles):
    args = SMALL.make(0) | {"group_sizes": jnp.asarray([13, 0, 8])}
    poisoned = args | {"w": args["w"].at[1].set(jnp.nan)}
    op = interpreted(tiles=tiles)
    np.testing.assert_array_equal(op(**poisoned), op(**args))


# ------------------------------------------------------------------ gradients


def arrays(sizes, rows, outputs, inputs):
    """Numbers for a product: NaN in rows past the groups, and in the weights of idle experts."""
    rng, sizes = np.random.default_rng(sum(sizes)), np.asarray(sizes, np.int32)
    grad, x = (rng.standard_normal((rows, n), np.float32) for n in (outputs, inputs))
    grad[sizes.sum() :] = x[sizes.sum() :] = np.nan
    w = rng.standard_normal((len(sizes), outputs, inputs), np.float32) * inputs**-0.5
    w[sizes == 0] = np.nan
    return [jnp.asarray(a, jnp.bfloat16) for a in (x, w, grad)], jnp.asarray(sizes)


def wanted(x, w, grad, sizes):
    """dx = grad w, dw = grad^T x within each group, 0 past the groups and for idle experts."""
    x, w, grad = (np.float64(a) for a in (x, w, grad))
    dx, dw, start = np.zeros_like(x), np.zeros_like(w), 0
    for expert, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        if size:
            dx[rows], dw[expert] = grad[rows] @ w[expert], grad[rows].T @ x[rows]
        start += size
    return dx, dw


def check_gradients(dx, dw, operands, sizes):
    want_dx, want_dw = wanted(*operands, sizes)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    assert_close(dx, want_dx, OP["bfloat16"], "dx")
    assert_close(dw, want_dw, OP["bfloat16"], "dw")
    assert not np.asarray(dx)[int(sizes.sum()) :].any(), "rows past the groups are exactly 0"
    assert not np.asarray(dw)[np.asarray(sizes) == 0].any(), "idle experts are exactly 0"


@on_cpu
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ([13, 0, 130, 3], 150),
        ([0, 1], 1),
        pytest.param([64, 8, 0], 96, marks=full),
    ],
    ids=["ragged", "one row", "whole loads"],
)
def test_gradients(sizes, rows):
    operands, sizes = arrays(sizes, rows, 160, 136)

    def both(x, w, grad):
        op = functools.partial(mosaic_sm90_bf16.grouped_matmul, sms=SMS, interpret=PARAMETERS)
        leading = w.reshape(len(w), 2, 80, -1)
        _, pull = jax.vjp(lambda x, w: op(x, w, sizes), x, leading)
        dx, dw = pull(grad.reshape(-1, 2, 80))
        return dx, dw.reshape(w.shape)

    check_gradients(*interpret(both, *operands), operands, sizes)


def of_rows(operands, sizes, **options):
    _, w, grad = operands
    keywords = {"sms": SMS, "interpret": PARAMETERS} | options
    dx = interpret(mosaic_sm90_bf16.GRADIENTS["x"], grad, w, sizes, **keywords)
    assert_close(dx, wanted(*operands, sizes)[0], OP["bfloat16"], "dx")


def of_weights(operands, sizes, **options):
    x, _, grad = operands
    keywords = {"sms": SMS, "interpret": PARAMETERS} | options
    dw = interpret(mosaic_sm90_bf16.GRADIENTS["w"], grad, x, sizes, **keywords)
    assert_close(dw, wanted(*operands, sizes)[1], OP["bfloat16"], "dw")


@on_cpu
@pytest.mark.parametrize(
    ("check_one", "tiles"),
    [
        (of_rows, FEW),
        (of_rows, Tiles(rows=128, outputs=192, stages=2)),
        (of_weights, Tiles(rows=128, deep=2, stages=2, auto_barriers=False)),
        pytest.param(of_weights, Tiles(rows=128, outputs=192, stages=2, staged=3), marks=full),
        pytest.param(of_weights, Tiles(rows=128, outputs=256, stages=4), marks=full),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_tiles_do_not_change_gradients(check_one, tiles):
    check_one(*arrays([5, 0, 69], 80, 128, 192), tiles=tiles)


# ------------------------------------------------------------------ planted bugs


def _whole_tiles(staged, out, first, begin, end, copy=block._copy_rows):
    copy(staged, out, first, begin, jnp.full_like(end, staged.shape[0]))


_OPERANDS = mosaic_sm90_bf16.Bf16Block._operands
BUGS = {
    "last inputs left out": (
        block.Geometry,
        "loads",
        property(lambda g: g.inputs // g.block // g.tiles.deep - 1),
    ),
    "rows after are stored": (block, "_copy_rows", _whole_tiles),
    "a piece of outputs stored twice": (
        mosaic_sm90_bf16.Bf16Block,
        "_operands",
        lambda self, mine, slot: _OPERANDS(self, 0 * mine, slot),
    ),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    with pytest.raises(AssertionError):
        check(has(monkeypatch, mosaic_sm90_bf16, *BUGS[bug], tiles=FEW, sms=1), SMALL)


def _bounds(change, clear=weight_gradient.WeightGradient._clear):
    """Rows are cleared as if a group were another."""

    def changed(self, warpgroup, item, slot, load):
        clear(self, warpgroup, dataclasses.replace(item, **change(item)), slot, load)

    return weight_gradient.WeightGradient, "_clear", changed


_PIECES = weight_gradient.WeightGradient._pieces
WEIGHT_BUGS = {
    "rows of the group before": _bounds(lambda item: {"start": item.aligned}),
    "rows of the group after": _bounds(lambda item: {"stop": item.stop + 64}),
    "rows of the load before once more": (
        weight_gradient.WeightGradient,
        "row",
        lambda self, item, load: (
            jax.lax.div(item.start, 8) * 8 + jnp.maximum(load - 1, 0) * self.g.deep
        ),
    ),
    "rows of x are not cleared": (
        weight_gradient.WeightGradient,
        "_pieces",
        lambda self, slot: _PIECES(self, slot)[: self.g.tiles.rows // 64],
    ),
}


@on_cpu
@pytest.mark.parametrize("bug", WEIGHT_BUGS)
def test_gradient_of_weights_sees(bug, monkeypatch):
    operands, sizes = arrays([5, 0, 70, 9], 88, 128, 128)
    has(monkeypatch, weight_gradient, *WEIGHT_BUGS[bug])
    with pytest.raises(AssertionError):
        of_weights(operands, sizes, tiles=MANY)


@on_cpu
def test_race_detector_sees_results_that_are_not_there(monkeypatch):
    bug = (block.plgpu, "commit_smem", lambda: None)
    with pytest.raises(RaceError):
        check(has(monkeypatch, mosaic_sm90_bf16, *bug, tiles=FEW, sms=1), SMALL)


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"dtype": "float32"}, "needs bfloat16 x and w where .* not float32 and float32"),
        ({"weight": "e4m3"}, "needs x and w both quantized, or neither"),
        ({"lead": (2, 66)}, "multiples of 8 outputs and inputs, not 132 and 256"),
        ({"k": 252}, "not 128 and 252"),
        ({"rows": 0, "padding": 0, "load": "none"}, "needs rows and experts, not 0 and 3"),
    ],
)
def test_refusals_name_what_is_needed(sizes, reason):
    args = dataclasses.replace(SMALL, **sizes).make(0)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(api.hopper_refusal(args["x"], args["w"]))


def test_only_a_name_takes_it_on_a_hopper(monkeypatch):
    monkeypatch.setattr(api, "no_hopper", lambda: None)
    args = SMALL.make(0).values()
    named = choose("grouped_matmul", "mosaic_sm90", api.IMPLEMENTATIONS, *args)
    assert named is api._mosaic_sm90
    assert choose("grouped_matmul", "auto", api.IMPLEMENTATIONS, *args) is not named
    assert api.hopper_kernel(SMALL.abstract()["w"]) is mosaic_sm90_bf16


def test_wide_items_need_many_rows():
    with pytest.raises(ValueError, match="self.outputs=256 must be 128, or 64, 192 or 256 with"):
        Tiles(rows=64, outputs=256)
    with pytest.raises(ValueError, match="self.outputs=96 must be"):
        Tiles(rows=128, outputs=96)


@pytest.mark.parametrize(
    ("outputs", "width"), [(2816, 256), (2048, 256), (1408, 128), (160, 192), (320, 128)]
)
def test_items_waste_few_outputs(outputs, width):
    assert bf16_tiles(1 << 20, 64, outputs).outputs == width
    assert weight_gradient_tiles(outputs).outputs == width


@pytest.mark.parametrize(
    ("mean", "rows"), [(0.1, 8), (1, 8), (2, 16), (9, 16), (10, 32), (57, 64), (58, 128)]
)
def test_weights_are_on_the_left_where_rows_are_few(mean, rows):
    assert bf16_tiles(round(100 * mean), 100, 256).rows == rows


@pytest.mark.parametrize(
    ("shape", "rows", "want"),
    [((16, 128), 8, (16, 128)), ((3, 136), 8, (8, 192)), ((9, 64), 64, (64, 64))],
)
def test_padding_is_zeros_at_the_end(shape, rows, want):
    out = padded.padded(jnp.ones((2, *shape), jnp.bfloat16), rows=rows)
    assert out.shape == (2, *want)
    assert (np.asarray(out)[:, : shape[0], : shape[1]] == 1).all() and out.sum() == 2 * math.prod(
        shape
    )


# ------------------------------------------------------------------ lowering for CUDA


@pytest.mark.parametrize(
    "case",
    # One size of V2-Lite every time: the other differs in the number of rows alone.
    [pytest.param(g, marks=full if "t8192" in str(g) else ()) for g in cases.GRADIENTS],
    ids=str,
)
def test_gradients_lower_for_cuda(case):
    op = functools.partial(mosaic_sm90_bf16.GRADIENTS[case.of], sms=H100_SMS)
    lowered = jax.jit(op).trace(*case.abstract()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 1


def test_experts_are_trained_by_it_if_asked_by_name(monkeypatch):
    """Two products, and two gradients of each."""
    for module in (api, experts_api):
        monkeypatch.setattr(module, "no_hopper", lambda: None)

    def loss(x, weights, gate_up, down, experts):
        return expert_mlp(x, weights, experts, gate_up, down, impl="mosaic_sm90").sum()

    shapes = ((96, 128), (96, 2), (4, 2, 72, 128), (4, 128, 72))
    dtypes = (jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.bfloat16)
    args = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, dtypes, strict=True)]
    experts = jax.ShapeDtypeStruct((96, 2), jnp.int32)
    text = lower_for_h100(jax.grad(loss, argnums=(0, 1, 2, 3)), *args, experts)
    assert text.count("mosaic_gpu_v2") == 6


# ------------------------------------------------------------------ on a GPU


@pytest.fixture
def hopper():
    if reason := no_hopper():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "rows"), [([13, 0, 130, 3], 150), ([0, 1], 1), ([64, 8, 0], 96), ([700, 65], 999)]
)
@pytest.mark.parametrize("lead", [(2, 80), (2, 192)], ids=str)
def test_gradients_on_a_gpu(sizes, rows, lead, hopper):
    operands, sizes = arrays(sizes, rows, math.prod(lead), 136)

    @jax.jit
    def both(x, w, grad, sizes):
        op = functools.partial(grouped_matmul, group_sizes=sizes, impl="mosaic_sm90")
        _, pull = jax.vjp(op, x, w.reshape(len(w), *lead, -1))
        dx, dw = pull(grad.reshape(-1, *lead))
        return dx, dw.reshape(w.shape)

    check_gradients(*both(*operands, sizes), operands, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.TRAINING, ids=str)
def test_training_shapes_on_a_gpu(case, hopper):
    """Product and gradients; a few experts against products in fp32."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (case.rows, case.k), (case.experts, *case.lead, case.k), (case.rows, *case.lead)
    x, w, grad = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    sizes = group_sizes(np.random.default_rng(0), case.rows, case.experts, case.load)
    run = jax.jit(lambda x, w, grad, sizes: _with_gradients(x, w, grad, sizes))
    results = run(x, w, grad, jnp.asarray(sizes))
    stops = np.cumsum(sizes)
    for expert in (0, int(sizes.argmin()), int(sizes.argmax()), case.experts - 1):
        rows = slice(int(stops[expert] - sizes[expert]), int(stops[expert]))
        want = _in_fp32(x[rows], w[expert], grad[rows])
        got = results[0][rows], results[1][rows], results[2][expert]
        for name, a, b in zip(("out", "dx", "dw"), got, want, strict=True):
            error = jnp.linalg.norm(jnp.float32(a).reshape(b.shape) - b) / jnp.linalg.norm(b)
            assert error < 3e-3, f"{name} of expert {expert}: {error}; rounding gives 1.7e-3"


def _with_gradients(x, w, grad, sizes):
    op = functools.partial(grouped_matmul, group_sizes=sizes, impl="mosaic_sm90")
    out, pull = jax.vjp(op, x, w)
    return out, *pull(grad)


@jax.jit
def _in_fp32(x, w, grad):
    x, w, grad = (jnp.float32(a) for a in (x, w.reshape(-1, w.shape[-1]), grad))
    grad = grad.reshape(len(grad), -1)
    with jax.default_matmul_precision("highest"):
        return x @ w.T, grad @ w, grad.T @ x
