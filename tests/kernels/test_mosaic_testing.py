"""The tools for Mosaic GPU kernels: interpreter, compiler logs, timing."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.testing import aot, bench, interpret
from pallas_kernels.testing.interpret import PARAMETERS, RaceError

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
X = np.arange(128 * 64, dtype=np.float32).reshape(128, 64)


def handed_over(*, order=True):
    """A kernel in which one warpgroup writes what another one reads, if in that order."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x, out, shared, written):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            shared[...] = x[...] * 2
            plgpu.barrier_arrive(written)

        @pl.when(warpgroup == 1)
        def _():
            if order:
                plgpu.barrier_wait(written)
            out[...] = shared[...]
            if not order:
                plgpu.barrier_wait(written)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(X.shape, X.dtype),
        scratch_types=[plgpu.SMEM(X.shape, X.dtype), plgpu.Barrier()],
        num_threads=2,
        thread_name="warpgroup",
        interpret=PARAMETERS,
    )


@on_cpu
def test_interpreter_runs_a_kernel():
    np.testing.assert_array_equal(interpret.interpret(handed_over(), X), X * 2)


@on_cpu
def test_interpreter_sees_a_race_in_any_kernel_of_a_function():
    right, racy = handed_over(), handed_over(order=False)
    with pytest.raises(RaceError):
        interpret.interpret(lambda x: right(racy(x)), X)
    np.testing.assert_array_equal(interpret.interpret(right, X), X * 2)


@on_cpu
def test_interpreter_goes_on_after_an_error():
    def failing(x):
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        interpret.interpret(failing, X)
    np.testing.assert_array_equal(interpret.interpret(handed_over(), X), X * 2)


@on_cpu
def test_interpreter_has_a_time_limit():
    with pytest.raises(TimeoutError, match=r"has not ended after 0.1 s"):
        interpret.interpret(time.sleep, 1, seconds=0.1)


@on_cpu
def test_interpreter_wants_enough_threads(monkeypatch):
    monkeypatch.setattr(interpret, "THREADS", 1000)
    with pytest.raises(RuntimeError, match="needs 1000 threads.*jax_num_cpu_devices"):
        interpret.interpret(handed_over(), X)


LOG = """\
ptxas info    : Compiling entry function 'k_mosaic_gpu_kernel' for 'sm_90a'
    40 bytes stack frame, 48 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 40 bytes cumulative stack size
"""
SERIALIZED = "(C7512) wgmma.mma_async instructions are serialized due to insufficient registers"


def test_compiler_logs_are_read(tmp_path):
    for index, text in ((10, LOG + SERIALIZED), (9, LOG)):
        (tmp_path / f"some_kernel_{index}.ptxas").write_text(text)
        (tmp_path / f"some_kernel_{index}.resources.txt").write_text(
            "Resources(smem_scratch_bytes=230400, tmem_scratch_cols=0)"
        )
    first, second = aot.read_usage(tmp_path)
    assert first == aot.Usage(
        kernel="some_kernel",
        registers=168,
        spill_stores=48,
        spill_loads=104,
        serialized=False,
        smem=230400,
    )
    assert second.serialized


def test_a_compiler_log_of_another_form_is_an_error(tmp_path):
    (tmp_path / "k_0.ptxas").write_text("ptxas 99: all fine")
    (tmp_path / "k_0.resources.txt").write_text("")
    with pytest.raises(ValueError, match=r"k_0.ptxas: expected 'Used .* registers'"):
        aot.read_usage(tmp_path)


def test_times_are_of_one_part(monkeypatch):
    monkeypatch.setattr(bench, "RUNS", 5)
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(bench, "_kernels", lambda *_: [0.3, 0.1, 0.2])
    monkeypatch.setattr(bench, "REST_SECONDS", 0.0)
    x = jnp.ones((256, 256))
    whole, third = (bench.measure(lambda x: x @ x, x, parts=p) for p in (1, 3))
    assert whole.wall.samples == 5 and whole.wall.p5 <= whole.wall.median <= whole.wall.p95
    assert whole.best is whole.kernels and whole.kernels.median == 0.2
    assert third.best.median == pytest.approx(0.2 / 3)
    assert third.rested.median == pytest.approx(0.2 / 3) and third.rested.samples == 9


def test_bursts_come_after_a_rest(monkeypatch):
    done = []
    monkeypatch.setattr(bench, "RUNS", 2)
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(bench, "_kernels", lambda *_: done.append("burst") or [0.3, 0.1])
    monkeypatch.setattr(bench.time, "sleep", done.append)
    bench.measure(lambda x: x + 1, jnp.ones(4))
    assert done == ["burst", *[bench.REST_SECONDS, "burst"] * bench.BURSTS]


def test_without_cupti_the_wall_clock_is_the_best():
    spread = bench.Spread.of([3.0, 1.0, 2.0])
    assert bench.Timing(wall=spread, kernels=None).best is spread
