"""The gradient kernels of `mla_prefill` for Hopper: interpreted against the gradient of the
reference, bugs the suite sees, their lists of tiles, lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_prefill
from pallas_kernels.mla_prefill import cases, gradient, mosaic_sm90, reference, work
from pallas_kernels.mla_prefill.gradient import GradientTiles
from pallas_kernels.select import no_hopper
from pallas_kernels.testing import Tolerance, assert_close, assert_equal, jit
from pallas_kernels.testing.lower import lower_for_h100
from tests.tolerances import OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
full = pytest.mark.full
INPUTS = mosaic_sm90.INPUTS
OF_SQUARES = Tolerance(
    abs=0.1,
    rel=2e-2,
    cosine=2e-5,
    reason="results of a kernel, rounded to 8 bits, are their own gradients, and then products are "
    "rounded: 4e-3 of the size of an array, a distance of 9e-6; the largest elements are 12 to 28, "
    "and single ones were off by 0.125",
)


def small(name, chunks, queries, keys, **options):
    sizes = {"nope": 128, "rope": 64, "value": 128, "dtype": "bfloat16", "heads": 1} | options
    return cases.Case(name=name, chunks=chunks, queries=queries, keys=keys, **sizes)


# A tile of queries past the end, keys before and after the queries', two sequences in a tile.
RAGGED = small("ragged", ((70, 60), (0, 0), (0, 90)), 160, 250, shuffled=False, heads=2)
CASES = (
    RAGGED,
    small("one token", ((0, 1),), 1, 1),
    small("nobody", ((4, 0),), 130, 20),
    small("shuffled", ((70, 60), (0, 0), (0, 90)), 160, 250),
    small("whole tiles", ((260, 130),), 130, 390, shuffled=False),
    small("rows", ((0, 150), (0, 40)), 150, 150, rows=2, same_rows=True),
)
GPU_CASES = (
    *CASES,
    small("long", ((1000, 500), (0, 700)), 1300, 2300, shuffled=False, heads=4),
    small("training", ((0, 700), (0, 324), (0, 1024)), 1024, 1024, rows=2, same_rows=True, heads=4),
)
SMALLER = {"for_queries": GradientTiles(own=64, walked=32), "for_keys": GradientTiles(own=64)}


@functools.cache
def expected(case, with_lse, lost=None):
    """(arrays for the kernels, plan, scale, gradients of the reference).

    NaN stands wherever nobody looks: in padding, in keys nobody sees, in gradients of log-sum-exps
    that are -inf. The keys of the sequence `lost` are not there.
    """
    args = case.make(0)
    inputs, plan, scale = {k: args[k] for k in INPUTS}, args["plan"], args["scale"]
    if lost is not None:
        plan = dataclasses.replace(plan, key_seq=jnp.where(plan.key_seq == lost, -1, plan.key_seq))

    def results(inputs):
        return reference.mla_prefill(**inputs, plan=plan, scale=scale)

    def pull(inputs, *gradients):
        return jax.vjp(results, inputs)[1](gradients)[0]

    rng = np.random.default_rng(1)
    out, lse = jit(results)(inputs)
    sees, padding = np.asarray(lse) > -np.inf, np.asarray(plan.query_seq) < 0
    d_out = rng.normal(size=out.shape)
    d_lse = np.where(sees, rng.normal(size=lse.shape), 0) * with_lse
    want = jit(pull)(inputs, jnp.asarray(d_out, out.dtype), jnp.asarray(d_lse, lse.dtype))
    poisoned = case.make(0, poison=True)
    d_out[padding], d_lse[~sees] = np.nan, np.nan
    arrays = [*(poisoned[k] for k in INPUTS), out, lse, jnp.asarray(d_out, out.dtype)]
    arrays.append(jnp.asarray(d_lse, lse.dtype) if with_lse else None)
    return arrays, plan, scale, want


def check(case, with_lse=True, lost=None, interpret=True, **tiles):
    arrays, plan, scale, want = expected(case, with_lse, lost)
    # Traced again, with a planted bug and without.
    run = functools.partial(gradient.gradients.__wrapped__, scale=scale, **tiles)
    got = jit(functools.partial(run, interpret=interpret))(*arrays, plan)
    for name, array, found in zip(INPUTS, arrays, got, strict=False):
        assert found.dtype == array.dtype
        assert_close(found, want[name], OP[case.dtype], f"gradient of {name}")
    return got


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_reference(case):
    check(case)


@on_cpu
def test_without_a_gradient_of_the_log_sum_exp():
    check(RAGGED, with_lse=False)


@on_cpu
def test_queries_that_see_nothing():
    """Of a sequence whose keys are elsewhere, as in a call for a part of them."""
    got = check(RAGGED, lost=2)
    assert np.abs(np.float32(got[0][:60])).max() > 1
    np.testing.assert_array_equal(np.float32(got[0][60:]), 0)


@on_cpu
@pytest.mark.parametrize("case", [RAGGED, pytest.param(CASES[3], marks=full)], ids=str)
def test_other_tiles(case):
    check(case, **SMALLER)


def test_a_gradient_has_some_size():
    *_, want = expected(RAGGED, True)
    assert all(np.abs(np.float32(x)).max() > 1 for x in want.values())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"own": 32}, "self.own=32 must be 64 or 128"),
        ({"walked": 48}, "self.walked=48 must be 32, 64 or 128"),
        ({"stages": 0}, "self.stages=0 must be at least 1"),
    ],
)
def test_tiles_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        GradientTiles(**sizes)


# ------------------------------------------------------------------ planted bugs

_PROGRAM = gradient._Program
_STATISTICS, _LOAD, _STORE = _PROGRAM.statistics, _PROGRAM.load, _PROGRAM.store
_DELTA = gradient._delta


def _changed(walk, change):
    def changed(*args):
        found = walk(*args)
        return dataclasses.replace(found, counts=change(found.counts))

    return changed


def _one_less(counts):
    return jnp.maximum(counts - 1, jnp.asarray([0, 0]))


def _all_full(counts):
    return counts[:, [1, 1]]


def _no_delta(program, rows):
    lse, delta = _STATISTICS(program, rows)
    return lse, delta * 0


def _nan_delta(out, lse, d_out, d_lse):
    return _DELTA(out, jnp.zeros_like(lse), d_out, d_lse)


def _without_lse(out, lse, d_out, d_lse):
    return _DELTA(out, lse, d_out, None)


def _not(forgotten):
    def store(program, name, rows, values):
        _STORE(program, name, rows, values * (name != forgotten))

    return store


def _no_rope(program, name, rows, used):
    return _LOAD(program, name, rows, used) * (name != "q_rope")


BUGS = {
    "delta is left out": (_PROGRAM, "statistics", _no_delta),
    "delta of padding stays NaN": (gradient, "_delta", _nan_delta),
    "the gradient of the log-sum-exp is left out": (gradient, "_delta", _without_lse),
    "a tile of queries is left out": (
        gradient,
        "walk_queries",
        _changed(work.walk_queries, _one_less),
    ),
    "a tile of keys is left out": (gradient, "walk_keys", _changed(work.walk_keys, _one_less)),
    "no tile of queries is masked": (
        gradient,
        "walk_queries",
        _changed(work.walk_queries, _all_full),
    ),
    "no tile of keys is masked": (gradient, "walk_keys", _changed(work.walk_keys, _all_full)),
    "unused rows are loaded": (
        _PROGRAM,
        "load",
        lambda p, name, rows, _: _LOAD(p, name, rows, None),
    ),
    "scores without rope": (_PROGRAM, "load", _no_rope),
    "the rope part of keys is forgotten": (_PROGRAM, "store", _not("d_k_rope")),
    "the rope part of queries is forgotten": (_PROGRAM, "store", _not("d_q_rope")),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(AssertionError):
        check(RAGGED)


# ------------------------------------------------------------------ lists of tiles


def brute_force(plan, query_tile, key_tile):
    """(something is seen, all is seen) of each pair of tiles."""
    mask = np.asarray(dataclasses.replace(plan, rows=1).mask()[0])
    tiles = query_tile, key_tile
    wide = np.pad(mask, [(0, -n % tile) for n, tile in zip(mask.shape, tiles, strict=True)])
    pairs = wide.reshape(-1, query_tile, wide.shape[1] // key_tile, key_tile)
    return pairs.any(axis=(1, 3)), pairs.all(axis=(1, 3))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sizes", [(128, 64), (64, 128), (64, 32)])
@pytest.mark.parametrize("of", ["queries", "keys"])
def test_each_seen_pair_is_walked_once_full_ones_first(of, sizes, shuffled):
    chunks = ((300, 260), (0, 0), (0, 1), (40, 500))
    case = small("lists", chunks, 800, 1200, shuffled=shuffled)
    plan = case.make(0)["plan"]
    seen, whole = brute_force(plan, *sizes)
    assert seen.any() and not seen.all()
    walk = work.walk_keys if of == "queries" else work.walk_queries
    found = jit(walk, static_argnums=(1, 2))(plan, *sizes)
    if of == "keys":
        seen, whole = seen.T, whole.T
    assert found.tiles.shape == seen.shape
    for tile, (full_count, count) in enumerate(np.asarray(found.counts)):
        listed = np.asarray(found.tiles[tile, :count])
        assert len(set(listed)) == count
        assert set(np.flatnonzero(seen[tile])) <= set(listed)
        assert set(listed[:full_count]) == set(np.flatnonzero(whole[tile]))
    if not shuffled:
        assert whole.any()
        assert found.counts[:, 1].sum() <= seen.sum() * 1.2  # ranges of sequences are coarse


# ------------------------------------------------------------------ the op's gradient


def pullback(case, **options):
    """Gradients of the op in its arrays, as a function of all it takes."""

    def run(q_nope, q_rope, k_nope, k_rope, v, plan, blocks):
        def op(*inputs):
            return mosaic_sm90.mla_prefill(
                *inputs, plan, scale=case.scale, blocks=blocks, **options
            )

        results, pull = jax.vjp(op, q_nope, q_rope, k_nope, k_rope, v)
        return pull(results)

    return run


TRITON, MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"
QUICK = ("deepseek-v3 b1 t4096",)


@pytest.mark.parametrize(
    "case",
    [
        GPU_CASES[-2],
        *(
            pytest.param(c, marks=[] if c.name in QUICK else full)
            for c in cases.BENCH
            if c.a_shape is None and c.top is None
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_lowers_for_cuda(case, with_lse):
    text = lower_for_h100(pullback(case, with_lse=with_lse), **case.abstract())
    assert (text.count(MOSAIC), text.count(TRITON)) == (1, 2)


LISTED = small("listed", ((0, 256),), 256, 256, same_rows=True, a_shape=(128, 128))
LARGE = small("large", ((0, 2**17),), 2**17, 2**17, same_rows=True, heads=128)


@pytest.mark.parametrize("case", [LISTED, LARGE], ids=str)
def test_others_have_the_gradient_of_xla(case):
    text = lower_for_h100(pullback(case), **case.abstract())
    assert TRITON not in text and "dot_general" in text


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [{}, SMALLER], ids=["usual tiles", "smaller tiles"])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_match_the_reference_on_a_gpu(case, tiles):
    if reason := no_hopper():
        pytest.skip(reason)
    first, second = (check(case, interpret=False, **tiles) for _ in range(2))
    jax.tree.map(functools.partial(assert_equal, name="second run"), second, first)


@pytest.mark.gpu
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradients_of_the_op_on_a_gpu(with_lse):
    if reason := no_hopper():
        pytest.skip(reason)
    args = small("gradients", ((0, 150), (0, 40)), 200, 200, same_rows=True, heads=2).make(0)
    inputs, plan, scale = {name: args[name] for name in INPUTS}, args["plan"], args["scale"]

    def gradients(impl):
        def loss(inputs):
            options = {"scale": scale, "with_lse": with_lse, "impl": impl}
            out, lse = mla_prefill(**inputs, plan=plan, **options)
            assert (lse is None) == (not with_lse and impl == "mosaic_sm90")
            extra = jnp.where(lse > -jnp.inf, lse, 0).sum() if with_lse else 0.0
            return (out.astype(jnp.float32) ** 2).sum() + extra

        return jit(jax.grad(loss))(inputs)

    got, want = gradients("mosaic_sm90"), gradients("reference")
    for name in INPUTS:
        assert_close(got[name], want[name], OF_SQUARES, name)
