"""Timing kernels, and the ceilings of the card they run on.

What is timed runs on data larger than the L2 cache, in one call after the other: see `Timing` for
the two methods. A benchmark states figures beside ceilings of the same run, because cards slow down
under load.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

RUNS = 25
"""Samples of each method."""
SAMPLE_SECONDS = 0.02
"""A wall-clock sample lasts at least this long."""
BURSTS, REST_SECONDS = 3, 0.3
"""Of the figures of a card that has rested: how often, and how long before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a call takes, in microseconds.

    Attributes:
        wall: wall-clock time of calls enqueued one after the other and waited for once, divided by
            their number: gaps between kernels and, if it is longer, the host's time are in it.
        kernels: sum of the kernels' own times by CUPTI; None where CUPTI cannot be used.
        rested: likewise in short bursts after a rest, of a card whose clock is not held down by
            heat and power yet.
    """

    wall: "Spread"
    kernels: "Spread | None"
    rested: "Spread | None" = None

    @property
    def best(self) -> "Spread":
        """The kernels' own time where it is known."""
        return self.kernels or self.wall


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of `samples` microseconds."""

    median: float
    p5: float
    p95: float
    samples: int

    @classmethod
    def of(cls, microseconds: list[float]) -> "Spread":
        """Of a list of samples."""
        cuts = statistics.quantiles(microseconds, n=20)
        return cls(statistics.median(microseconds), cuts[0], cuts[-1], len(microseconds))


def measure(function: Callable[..., Any], *args: Any, parts: int = 1) -> Timing:
    """Times a function that is compiled here.

    Args:
        function: traceable.
        *args: its arguments, on the device.
        parts: equal pieces of work in a call; the result is for one of them.
    """
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    begun = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    calls = max(2, int(SAMPLE_SECONDS / (time.perf_counter() - begun)))
    wall = [_wall(compiled, args, calls) / parts for _ in range(RUNS)]
    kernels = _kernels(compiled, args)
    rested: list[float] = []
    for _ in range(BURSTS if kernels else 0):
        time.sleep(REST_SECONDS)
        rested += _kernels(compiled, args) or []
    return Timing(
        wall=Spread.of(wall),
        kernels=_each(kernels, parts) if kernels else None,
        rested=_each(rested, parts) if rested else None,
    )


def _each(microseconds: list[float], parts: int) -> Spread:
    return Spread.of([us / parts for us in microseconds])


def _wall(compiled: Any, args: tuple[Any, ...], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        out = compiled(*args)
    jax.block_until_ready(out)
    return 1e6 * (time.perf_counter() - begun) / calls


def _kernels(compiled: Any, args: tuple[Any, ...]) -> list[float] | None:
    # Not at the top: what it imports takes a second or more.
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, milliseconds = profiler.measure(compiled, iterations=RUNS)(*args)
    except RuntimeError as error:  # no CUPTI, or another program holds it
        print(f"CUPTI is not used: {error}")
        return None
    return milliseconds and [1e3 * ms for ms in milliseconds]


@jax.jit
def relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """|got - want| / |want|, in fp32."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the card reaches in simple programs.

    Attributes:
        matmul_tflops: bf16 products [8192, 8192] x [8192, 8192].
        fp8_tflops: likewise e4m3, with a bf16 result.
        read_gbs: reading 4 GiB, for a sum.
        copy_gbs: reading and writing 2 GiB each, in one sum.
    """

    matmul_tflops: float
    fp8_tflops: float
    read_gbs: float
    copy_gbs: float


def measure_ceilings(size: int = 8192, gib: float = 4.0) -> Ceilings:
    """Of the default device. The arguments are for machines that are smaller than an H100."""
    key = jax.random.key(0)
    a, b = (jax.random.normal(k, (size, size), jnp.bfloat16) for k in jax.random.split(key))
    matmul = measure(jnp.matmul, a, b).best.median
    a, b = (m.astype(jnp.float8_e4m3fn) for m in (a, b))
    fp8 = measure(_matmul_by_rows, a, b).best.median
    words = jax.random.bits(key, (int(gib * 2**28),), jnp.uint32)
    read = measure(jnp.max, words).best.median
    half = words[: words.size // 2]
    del words
    copy = measure(lambda x: x + 1, half).best.median
    return Ceilings(
        matmul_tflops=2 * size**3 / matmul / 1e6,
        fp8_tflops=2 * size**3 / fp8 / 1e6,
        read_gbs=gib * 2**30 / read / 1e3,
        copy_gbs=gib * 2**30 / copy / 1e3,
    )


def _matmul_by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T, which is how fp8 products want their operands."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)
