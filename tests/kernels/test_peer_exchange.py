"""`peer_exchange` against its definition: by XLA on simulated devices, the kernel on one device in
the interpreter, lowered for several GPUs, and on GPUs; and the bugs that the suite sees.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import peer_exchange
from pallas_kernels.peer_exchange import api, cases, mosaic_sm90, transport
from pallas_kernels.select import no_hopper
from pallas_kernels.testing.interpret import PARAMETERS, RaceError, interpret
from pallas_kernels.testing.lower import lower_for_h100s
from tests.parallel.common import AXIS, needs_8, on_ranks

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
CASES = {case.name: case for case in cases.CASES}


def check(op, case, seed=0):
    """What `op` returns of the arrays of all ranks."""
    args = case.make(seed, poison=True)
    out, told = (np.asarray(x) for x in op(**args))
    rows, counts = (np.asarray(x) for x in args.values())
    np.testing.assert_array_equal(told, counts.T)
    for receiver in range(case.ranks):
        for sender in range(case.ranks):
            came, sent = out[receiver, sender], rows[sender, receiver]
            there = slice(counts[sender, receiver])
            np.testing.assert_array_equal(came[there].view(np.uint8), sent[there].view(np.uint8))


def sharded(impl):
    """The op over a mesh, as `check` calls it."""

    def op(rows, counts):
        ranks = rows.shape[0]
        run = functools.partial(peer_exchange, axis=AXIS, impl=impl)
        out, told = on_ranks(run, ranks)(rows.reshape(-1, *rows.shape[2:]), counts.reshape(-1))
        return out.reshape(rows.shape), told.reshape(counts.shape)

    return op


@needs_8
@pytest.mark.parametrize("impl", ["reference", "xla", "auto"])
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_is_its_definition(case, impl):
    check(sharded(impl), case)


@needs_8
def test_is_its_definition_on_eight_ranks():
    case = cases.Case(name="eight", ranks=8, capacity=5, width=3)
    for impl in ("reference", "xla"):
        check(sharded(impl), case)


@needs_8
def test_counts_are_kept_within_a_run():
    args = CASES["bfloat16"].make(0)
    beyond = jnp.array([[-3, 16], [17, 99]], jnp.int32)
    _, told = sharded("xla")(args["rows"], beyond)
    np.testing.assert_array_equal(told, [[0, 16], [16, 16]])


# ------------------------------------------------------------------ the kernel, on one device


def looped(rows, counts, **options):
    options = {"thread_blocks": 6, "tile_bytes": 256} | options
    return interpret(mosaic_sm90.loop_back, rows, counts, interpret=PARAMETERS, **options)


@on_cpu
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_kernel_is_its_definition(case):
    check(looped, case)


@on_cpu
@pytest.mark.parametrize("thread_blocks", [1, 3, 132])
def test_any_number_of_thread_blocks(thread_blocks):
    check(functools.partial(looped, thread_blocks=thread_blocks, tile_bytes=128), CASES["ragged"])


@pytest.mark.parametrize("capacity", [1, 7, 12, 1024])
@pytest.mark.parametrize("row_bytes", [16, 14400, 48 * 1024])
def test_tiles_share_a_run_and_fit(capacity, row_bytes):
    rows = mosaic_sm90._rows_at_once(capacity, row_bytes, mosaic_sm90.TILE_BYTES)
    assert rows >= 1 and capacity % rows == 0
    assert rows == 1 or rows * row_bytes <= mosaic_sm90.TILE_BYTES
    assert mosaic_sm90.SLOTS * rows * row_bytes <= 200 * 1024


# ------------------------------------------------------------------ planted bugs


MANY_TILES = cases.Case(name="many tiles", ranks=2, capacity=24, width=16, counts=(24, 21))
ONE_BLOCK = {"thread_blocks": 1, "tile_bytes": 64}


@on_cpu
def test_suite_sees_only_bugs(monkeypatch):
    careless(monkeypatch, "barrier_wait", lambda *_: False)


@on_cpu
def test_suite_sees_rows_that_go_to_another_rank(monkeypatch):
    right = transport.OneDevice.remote

    def next_one(self, ref, rank):
        return right(self, ref, lax.rem(rank + 1, jnp.int32(self.ranks)))

    monkeypatch.setattr(transport.OneDevice, "remote", next_one)
    with pytest.raises(AssertionError):
        check(looped, CASES["ragged"])


@on_cpu
def test_suite_sees_rows_of_another_rank(monkeypatch):
    monkeypatch.setattr(transport.OneDevice, "own", lambda self, ref: ref.at[0])
    with pytest.raises(AssertionError):
        check(looped, CASES["ragged"])


@on_cpu
def test_suite_sees_a_run_that_is_too_short():
    def short(rows, counts):
        return looped(rows, jnp.maximum(counts - 1, 0), tile_bytes=64)[0], counts.T

    with pytest.raises(AssertionError):
        check(short, MANY_TILES)


def careless(monkeypatch, wait, forgets):
    """Checks the kernel without some calls of `wait`."""
    right = getattr(mosaic_sm90.plgpu, wait)

    def maybe(*args, **options):
        if not forgets(*args, **options):
            right(*args, **options)

    changed = SimpleNamespace(**vars(mosaic_sm90.plgpu) | {wait: maybe})
    monkeypatch.setattr(mosaic_sm90, "plgpu", changed)
    check(functools.partial(looped, **ONE_BLOCK), MANY_TILES)


@on_cpu
def test_interpreter_sees_a_tile_that_leaves_before_it_came(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="no threads observed phase"):
        careless(monkeypatch, "barrier_wait", lambda *_: True)


@on_cpu
def test_interpreter_sees_a_slot_that_is_filled_while_it_leaves(monkeypatch):
    with pytest.raises(RaceError):
        careless(monkeypatch, "wait_smem_to_gmem", lambda groups, **_: groups == 1)


@on_cpu
def test_interpreter_sees_copies_that_have_not_ended(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Not all copy_smem_to_gmem"):
        careless(monkeypatch, "wait_smem_to_gmem", lambda groups, **_: groups == 0)


def test_nothing_asks_for_multicast():
    """NVLink multicast takes resources that a whole host shares."""
    sources = list(Path(mosaic_sm90.__file__).parent.glob("*.py"))
    assert len(sources) > 5
    for source in sources:
        text = source.read_text()
        for name in ("multimem", "multicast_ref", "signal_multicast", "nvshmem"):
            assert name not in text, f"{source.name}: {name}"


# ------------------------------------------------------------------ choices and lowering


def refusal_of(case, **options):
    found = []
    run = on_ranks(lambda *args: found.append(api.refusal(*args, AXIS)) or args, case.ranks)
    jax.eval_shape(run, *case.abstract())
    return found[0]


@needs_8
def test_refusals_name_what_is_needed(monkeypatch):
    case = CASES["ragged"]
    assert refusal_of(case) is None
    wide = cases.Case(name="wide", ranks=2, capacity=1, width=2**14)
    assert "rows of at most 49152 bytes, not 65536" in refusal_of(wide)
    empty = cases.Case(name="empty", ranks=2, capacity=0, width=4)
    assert "needs rows, and at most 8 ranks, not (2, 0, 4)" in refusal_of(empty)
    assert "needs a shard_map over all axes" in api.refusal(
        jnp.zeros((2, 1, 4)), jnp.zeros(2, jnp.int32), AXIS
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "all GPUs in one process, not in 2" in refusal_of(case)


@on_cpu
def test_a_cpu_never_runs_it():
    with pytest.raises(NotImplementedError, match=r"peer_exchange.*needs an H100 or H200"):
        sharded("mosaic_sm90")(**CASES["ragged"].make(0))


@pytest.mark.parametrize("ranks", [2, 8])
def test_lowers_for_cuda(ranks):
    case = CASES[f"deepseek-v3 {ranks} ranks c128"]
    run = functools.partial(mosaic_sm90.peer_exchange, axis=AXIS)
    text = lower_for_h100s(run, *case.abstract(), ranks=ranks, axis=AXIS)
    assert text.count("mosaic_gpu_v2") == 1
    assert "uses_xla_collective_metadata = true" in text
    assert "skip_device_barrier = false" in text  # the docstring of the kernel relies on it
    assert "symmetric_memory_parameters" not in text  # which is what multicast would need


# ------------------------------------------------------------------ on GPUs


def hopper_ranks():
    if reason := no_hopper():
        pytest.skip(reason)
    return min(jax.device_count(), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_one_gpu_runs_the_kernel(case):
    """All ranks in its own memory."""
    hopper_ranks()
    op = jax.jit(functools.partial(mosaic_sm90.loop_back, thread_blocks=6, tile_bytes=256))
    check(op, case)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("capacity", [1, 8, 128, 1024])
def test_gpus_run_the_kernel(capacity):
    name = "of all GPUs"
    case = cases.Case(
        name=name, ranks=hopper_ranks(), capacity=capacity, width=7168, dtype="bfloat16"
    )
    check(sharded("mosaic_sm90"), case)


@pytest.mark.gpu(2)
def test_gpus_exchange_rows_of_any_width():
    for dtype, width in (("uint8", 33), ("float32", 7), ("bfloat16", 24)):
        case = cases.Case(name=dtype, ranks=hopper_ranks(), capacity=10, width=width, dtype=dtype)
        check(sharded("mosaic_sm90"), case)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("unroll", [1, 50], ids=["loop", "unrolled"])
def test_exchanges_in_a_row_do_not_touch_each_other(unroll):
    """50 in one program, with other counts each time, and ranks that are slow in turn."""
    ranks, capacity = hopper_ranks(), 64
    case = cases.Case(name="chain", ranks=ranks, capacity=capacity, width=1024, dtype="bfloat16")
    args = case.make(0)

    def chain(impl, rows, counts):
        me = lax.axis_index(AXIS)

        def step(carry, index):
            rows, counts = carry
            rows = slow_down(rows, jnp.where(index % ranks == me, 40, 0))
            got, told = peer_exchange(rows, counts, AXIS, impl=impl)
            is_there = (jnp.arange(capacity) < told[:, None])[..., None]
            seen = jnp.where(is_there, got, 0).astype(jnp.float32).sum((0, 1))
            rows = jnp.where(is_there, got, rows) + (index % 3).astype(rows.dtype)
            counts = (counts * 7 + told * 5 + me + index) % (capacity + 1)
            return (rows % 128, counts), seen

        steps = jnp.arange(50, dtype=jnp.int32)
        (rows, counts), seen = lax.scan(step, (rows, counts), steps, unroll=unroll)
        return rows, counts, seen

    flat = (args["rows"].reshape(-1, capacity, 1024), args["counts"].reshape(-1))
    want = on_ranks(functools.partial(chain, "xla"), ranks)(*flat)
    run = on_ranks(functools.partial(chain, "mosaic_sm90"), ranks)
    for _ in range(3):
        for mine, theirs in zip(run(*flat), want, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def slow_down(rows, products):
    """The rows, later."""
    x = jnp.ones((512, 512), jnp.float32) / 512
    x = lax.fori_loop(0, products, lambda _, x: x @ x, x)
    return rows + jnp.where(x[0, 0] < 0, 1, 0).astype(rows.dtype)
