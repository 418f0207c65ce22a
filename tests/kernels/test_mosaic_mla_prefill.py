"""The Hopper kernel of `mla_prefill`: interpreted on cases, bugs the suite sees, block lists,
lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MlaPrefillPlan, mla_prefill
from pallas_kernels.mla_prefill import api, attend, cases, copies, mosaic_sm90, reference, work
from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.tiles import Tiles
from pallas_kernels.select import choose, no_hopper
from pallas_kernels.softmax import merge
from pallas_kernels.testing import assert_close, call, jit
from pallas_kernels.testing.interpret import PARAMETERS, RaceError, interpret
from pallas_kernels.testing.lower import lower_for_h100
from tests.oracles import attention
from tests.tolerances import OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
full = pytest.mark.full
INPUTS = mosaic_sm90.INPUTS


def small(name, chunks, queries, keys, **options):
    sizes = {"nope": 128, "rope": 64, "value": 128, "dtype": "bfloat16", "heads": 1} | options
    return cases.Case(name=name, chunks=chunks, queries=queries, keys=keys, **sizes)


# Tiles beyond the end, of padding alone, and of two sequences; keys nobody sees in most tiles.
RAGGED = small("hopper ragged", ((70, 60), (0, 0), (0, 90)), 160, 250, shuffled=False)
CASES = (
    RAGGED,
    small("hopper one token", ((0, 1),), 1, 1),
    small("hopper nobody", ((4, 0),), 130, 20),
    small("hopper whole tiles", ((200, 90),), 90, 290, shuffled=False, heads=2),
)
ROWS = small("hopper same rows", ((0, 150), (0, 40)), 150, 150, rows=2, same_rows=True)
SHUFFLED = small("hopper shuffled", ((70, 60), (0, 0), (0, 90)), 160, 250)
GPU_CASES = (
    *CASES,
    ROWS,
    SHUFFLED,
    small("hopper long", ((1000, 500), (0, 700)), 1300, 2300, shuffled=False, heads=4),
)


@functools.cache
def expected(case, seed=0):
    """(arguments with poison, out, lse of the oracle)."""
    args = case.make(seed, poison=True)
    arrays = (np.asarray(args[name]) for name in INPUTS)
    return args, *attention.prefill(*arrays, *case.plan_arrays(seed), args["scale"])


def check(op, case):
    args, want_out, want_lse = expected(case)
    out, lse = op(**args)
    assert out.dtype == args["q_nope"].dtype and lse.dtype == jnp.float32
    assert_close(out, want_out, OP[case.dtype], "out")
    assert_close(lse, want_lse, OP[case.dtype], "lse")


def run(**options):
    """The kernel in the interpreter, traced again for each `run`."""
    kernel = functools.partial(mosaic_sm90.mla_prefill, **options, interpret=PARAMETERS)
    compiled = jit(lambda scale, **args: kernel(**args, scale=scale), static_argnames="scale")
    return lambda **args: interpret(compiled, **args)


@on_cpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case):
    check(run(), case)


@full
@on_cpu
@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (SHUFFLED, Tiles()),
        (ROWS, Tiles()),
        (RAGGED, Tiles(slots=1)),
        (RAGGED, Tiles(ping_pong=False)),
        (RAGGED, Tiles(keys=64, slots=3)),
    ],
    ids=str,
)
def test_tiles_and_orders_match_the_oracle(case, tiles):
    check(run(tiles=tiles), case)


@on_cpu
def test_prefix_and_chunk_merge_exactly():
    args, want_out, want_lse = expected(RAGGED)
    op, plan, parts = run(), args["plan"], []
    is_new = plan.key_pos >= jnp.asarray([70, 0, 0])[plan.key_seq]
    for keep in (is_new, ~is_new):
        part = dataclasses.replace(plan, key_seq=jnp.where(keep, plan.key_seq, -1))
        out, lse = op(**args | {"plan": part})
        parts += [out.astype(jnp.float32), lse]
    out, lse = merge(*parts)
    assert_close(out, want_out, OP["bfloat16"], "out")
    assert_close(lse, want_lse, OP["bfloat16"], "lse")


# ------------------------------------------------------------------ planted bugs


def has(monkeypatch, module, name, replacement):
    monkeypatch.setattr(module, name, replacement)
    function = mosaic_sm90._run.__wrapped__  # traced again, with the bug and without
    monkeypatch.setattr(mosaic_sm90, "_run", jax.jit(lambda *a: function(*a), static_argnums=0))


def _one_tile_less(plan, key_tile, blocks=None):
    found = work.list_work(plan, key_tile, blocks)
    return dataclasses.replace(found, counts=jnp.maximum(found.counts - 1, jnp.asarray([0, 1])))


def _all_full(plan, key_tile, blocks=None):
    found = work.list_work(plan, key_tile, blocks)
    return dataclasses.replace(found, counts=found.counts.at[..., 0].set(found.counts[..., 1]))


def _not_shrunk(b, warpgroup, scores, out, top, total):
    probs, _, *rest = _softmax(b, warpgroup, scores, out, top, total)
    return probs, out, *rest


_softmax = attend._softmax
BUGS = {
    "a tile is left out": (mosaic_sm90, "list_work", _one_tile_less),
    "no tile is masked": (mosaic_sm90, "list_work", _all_full),
    "values of unused keys stay NaN": (copies, "_clear_unused", lambda *_: None),
    "older results not shrunk": (attend, "_softmax", _not_shrunk),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    has(monkeypatch, *BUGS[bug])
    with pytest.raises(AssertionError):
        check(run(), RAGGED)


@on_cpu
def test_race_detector_sees_a_missing_fence(monkeypatch):
    has(monkeypatch, copies.plgpu, "commit_smem", lambda: None)
    with pytest.raises(RaceError):
        check(run(), RAGGED)


# ------------------------------------------------------------------ block lists


def blocks_case(key_tile):
    case = small("hopper blocks", ((120, 200),), 200, 320, shuffled=False, heads=2)
    chosen = np.random.default_rng(3).random((2, 2, -(-320 // key_tile))) < 0.5
    assert not chosen.all() and chosen.any(axis=2).all()
    return case.make(0, poison=True) | {"blocks": BlockList.of(jnp.asarray(chosen), key_tile)}


@on_cpu
@pytest.mark.parametrize("key_tile", [pytest.param(64, marks=full), 128])
def test_a_block_list_means_the_same_as_in_the_reference(key_tile):
    args = blocks_case(key_tile)
    want = call(reference.mla_prefill, args)
    for got, expect, name in zip(run()(**args), want, ("out", "lse"), strict=True):
        assert_close(got, expect, OP["bfloat16"], name)


def test_blocks_need_their_key_tile():
    args = RAGGED.make(0) | {"blocks": BlockList.of(jnp.ones((1, 2, 4), bool), 64)}
    with pytest.raises(ValueError, match="tiles.keys=128 must be the blocks.key_tile=64"):
        mosaic_sm90.mla_prefill(**args, tiles=Tiles())


# ------------------------------------------------------------------ gradients


@on_cpu
def test_interpreted_gradients_are_those_of_xla():
    args = CASES[1].make(0)
    inputs, scale = {name: args.pop(name) for name in INPUTS}, args.pop("scale")

    def gradients(op):
        def loss(inputs):
            out, lse = op(**inputs, **args, scale=scale)
            return (out.astype(jnp.float32) ** 2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

        return jit(jax.grad(loss))

    kernel = functools.partial(mosaic_sm90.mla_prefill, interpret=PARAMETERS)
    got, want = interpret(gradients(kernel), inputs), gradients(reference.mla_prefill)(inputs)
    for name in INPUTS:
        assert_close(got[name], want[name], OP["bfloat16"], name)
    assert np.abs(np.float32(want["v"])).max() > 1


# ------------------------------------------------------------------ the list of work


list_work = jit(work.list_work, static_argnums=1)


def brute_force(plan, key_tile):
    """(something is seen, all is seen) of each pair of tiles."""
    mask = np.asarray(dataclasses.replace(plan, rows=1).mask()[0])
    queries, keys = (
        -(-n // tile) * tile for n, tile in zip(mask.shape, (128, key_tile), strict=True)
    )
    wide = np.zeros((queries, keys), bool)
    wide[: mask.shape[0], : mask.shape[1]] = mask
    pairs = wide.reshape(queries // 128, 128, keys // key_tile, key_tile)
    return pairs.any(axis=(1, 3)), pairs.all(axis=(1, 3))


@pytest.mark.parametrize("key_tile", [64, 128])
@pytest.mark.parametrize("shuffled", [False, True])
def test_work_lists_each_seen_tile_once_full_ones_first(key_tile, shuffled):
    chunks = ((300, 260), (0, 0), (0, 1), (40, 500))
    case = small("work", chunks, 800, 1200, shuffled=shuffled)
    plan = case.make(0)["plan"]
    seen, whole = brute_force(plan, key_tile)
    assert seen.any() and not seen.all()
    found = list_work(plan, key_tile)
    for tile, (full_count, count) in enumerate(found.counts[0]):
        listed = np.asarray(found.tiles[0, tile, :count])
        assert len(set(listed)) == count >= 1
        assert set(np.flatnonzero(seen[tile])) <= set(listed)
        assert set(listed[:full_count]) == set(np.flatnonzero(whole[tile]))
        if not shuffled:
            assert count <= seen[tile].sum() + 1  # ranges of several sequences are coarse
    used = np.pad(np.asarray(plan.key_seq) >= 0, (0, -1200 % key_tile)).reshape(-1, key_tile)
    np.testing.assert_array_equal(found.unused, ~used.all(axis=1))


def test_padding_queries_do_not_meet_unused_keys():
    nobody = jnp.full(128, -1)
    found = list_work(MlaPrefillPlan(nobody, nobody * 0, nobody, nobody * 0), 128)
    np.testing.assert_array_equal(found.counts, [[[0, 1]]])
    assert set(np.asarray(found.query_seq)).isdisjoint(np.asarray(found.key_seq).tolist())


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"dtype": "float32"}, "needs bfloat16, not float32"),
        ({"value": 64}, r"needs heads of (128, 64, 128) (nope, rope, value), not (128, 64, 64)"),
        ({"nope": 64}, "not (64, 64, 128)"),
        ({"chunks": (), "queries": 0}, "needs a query and a key, not 0 and 250"),
        ({"chunks": (), "keys": 0}, "not 160 and 0"),
    ],
)
def test_refusals_name_what_is_needed(sizes, reason):
    args = dataclasses.replace(RAGGED, **sizes).make(0)
    refusal = api.hopper_refusal(*(args[name] for name in INPUTS))
    assert refusal is not None and reason in refusal


@on_cpu
def test_a_cpu_never_runs_it():
    args = list(RAGGED.make(0).values())[:-1]
    with pytest.raises(NotImplementedError, match="mosaic_sm90.*needs an H100 or H200"):
        choose("mla_prefill", "mosaic_sm90", api.IMPLEMENTATIONS, *args, with_lse=True)
    assert api.hopper_refusal(*args) is None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"keys": 96}, "self.keys=96 must be 64 or 128"), ({"slots": 3}, "self.slots=3 must be 1 to")],
)
def test_tiles_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**sizes)


# ------------------------------------------------------------------ lowering for CUDA


QUICK = ("deepseek-v3 b1 t4096",)


@pytest.mark.parametrize(
    "case",
    [
        GPU_CASES[-1],  # lengths that copies cannot take as they are
        *(pytest.param(c, marks=[] if c.name in QUICK else full) for c in cases.BENCH),
    ],
    ids=str,
)
def test_lowers_for_cuda(case):
    run = functools.partial(mosaic_sm90.mla_prefill, scale=case.scale)
    assert lower_for_h100(run, **case.abstract()).count("mosaic_gpu_v2") == 1


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "tiles"),
    [(case, None) for case in GPU_CASES + cases.FULL] + [(GPU_CASES[-1], Tiles(keys=64, slots=4))],
    ids=str,
)
def test_matches_oracle_on_a_gpu(case, tiles):
    if reason := no_hopper():
        pytest.skip(reason)
    if tiles is None:
        check(lambda **args: call(mla_prefill, args | {"impl": "mosaic_sm90"}), case)
        return
    op = jax.jit(functools.partial(mosaic_sm90.mla_prefill, tiles=tiles), static_argnames="scale")
    check(op, case)


@pytest.mark.gpu
@pytest.mark.parametrize("key_tile", [64, 128])
def test_block_lists_on_a_gpu(key_tile):
    if reason := no_hopper():
        pytest.skip(reason)
    args = blocks_case(key_tile)
    want = call(mla_prefill, args | {"impl": "reference"})
    got = call(mla_prefill, args | {"impl": "mosaic_sm90"})
    for found, expect, name in zip(got, want, ("out", "lse"), strict=True):
        assert_close(found, expect, OP["bfloat16"], name)
