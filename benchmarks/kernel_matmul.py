"""`matmul` with fp8 weights for `benchmarks.kernels`: inputs of a case made on the device, check
and figures.

The time of "mosaic_sm90" is that of the kernel and of the sum of its splits, on rows that are
quantized already; "mosaic_sm90 op" is the whole op.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.layers import one_by_one
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.matmul import mosaic_sm90, xla
from pallas_kernels.matmul.cases import BENCH, Case
from pallas_kernels.matmul.tiles import MOST_SPLITS, Cut, usual_cut
from pallas_kernels.quant import FP8_BLOCK, FP8_TILE, QTensor, dequantise, quantise
from pallas_kernels.select import count_sms
from pallas_kernels.testing.bench import relative_error

CASES = BENCH
SET_BYTES = 2**28
"""Sets of weights are added until they are at least this large: five times the L2 cache."""
MATMUL = "fp8_tflops"
TOLERANCE = 6e-3
"""Of |got - want| / |want|. bf16 results: 1.7e-3 is usual."""
CHECKED = 256
"""Outputs that are checked, the first and the last."""
REFERENCES: dict[str, dict[str, float]] = {}
REFERENCE_CEILINGS = {"fp8_tflops": 1378.0, "read_gbs": 3120.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """The Hopper kernel with this cut.

    Attributes:
        cut: None for the usual one.
        whole: time the whole op.
    """

    cut: Cut | None = None
    whole: bool = False

    def __call__(self, x: jax.Array, w: QTensor) -> jax.Array:
        """The op."""
        return mosaic_sm90.matmul(x, w, cut=self.cut)

    def prepare(self, x: jax.Array, w: QTensor) -> tuple[Any, Callable[..., jax.Array]]:
        """(Rows as the kernel reads them; the kernel as a function of these and of weights)."""
        g = mosaic_sm90.geometry(x.shape[0], w, self.cut, None, None)
        rows = jax.jit(mosaic_sm90.prepare, static_argnums=1)(x, g)
        return rows, lambda rows, w: mosaic_sm90.multiply(rows[0], rows[1], w, g)


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device: x, and several sets of weights. Values are random bits, which
    are made much faster than weights are quantized.
    """
    shapes = case.abstract()["w"]
    size = shapes.values.size
    keys = jax.random.split(jax.random.key(seed), 1 + max(1, -(-SET_BYTES // size)))
    return {
        "x": jax.random.normal(keys[0], (*case.tokens, case.k), jnp.bfloat16),
        "weights": [_weight(key, shapes.values.shape, shapes.scales.shape) for key in keys[1:]],
    }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(key: jax.Array, shape: tuple[int, ...], scales: tuple[int, ...]) -> QTensor:
    bits = jax.random.bits(key, shape, jnp.uint8)
    bits = jnp.where(bits & 0x7F == 0x7F, 0, bits)  # which would be NaN
    deviation = 100 * shape[-1] ** 0.5  # of such values, times that of a sum
    scale = jax.random.uniform(key, scales, minval=0.5, maxval=2.0) / deviation
    values = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    return QTensor(values, scale, FP8_BLOCK.block, FP8_BLOCK.format)


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    rows, outputs, blocks = math.prod(case.tokens), math.prod(case.lead), case.k // 128
    usual = usual_cut(rows, outputs, blocks, count_sms())
    yield "mosaic_sm90", Kernel(), usual
    yield "mosaic_sm90 op", Kernel(whole=True), None
    if others:
        yield "xla", xla.matmul, None
    if sweep:
        for cut in cuts(rows, outputs, blocks):
            if cut != usual:
                yield f"mosaic_sm90 {_words(cut)}", Kernel(cut=cut), cut


def cuts(rows: int, outputs: int, blocks: int) -> Iterator[Cut]:
    """For a sweep: those that leave no more than half of the device idle."""
    others: list[dict[str, Any]] = [{}, {"together": 2}, {"auto_barriers": False}]
    tiles = [
        Tiles(rows=128, outputs=width, stages=stages, staged=1, registers=(24, 240), **more)
        for width, stages in ((128, 5), (64, 7))
        for more in others
    ]
    left = [
        Tiles(rows=size, deep=deep, stages=stages // deep, auto_barriers=barriers)
        for size, stages in ((8, 12), (16, 12), (32, 10), (64, 6))
        for deep in (1, 2)
        for barriers in (True, False)
        if size >= min(rows, 64) and (rows > 64 or size < 2 * max(rows, 8))
    ]
    for tile in left if rows <= 64 else [*left, *tiles]:
        for splits in range(1, MOST_SPLITS + 1):
            cut = Cut(tiles=tile, splits=splits)
            items = -(-rows // tile.rows) * -(-outputs // tile.outputs) * splits
            few, many = items < 0.4 * count_sms(), splits > 1 and items > 5 * count_sms()
            if not (few or many or cut.refusal(outputs, blocks)):
                yield cut


def _words(cut: Cut) -> str:
    changed = {
        field.name: value
        for field in dataclasses.fields(cut.tiles)
        if (value := getattr(cut.tiles, field.name)) != field.default
    }
    return " ".join(f"{name} {value}" for name, value in {"splits": cut.splits, **changed}.items())


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each set of weights; what it takes; how many sets)."""
    x, weights = args["x"], args["weights"]
    if isinstance(run, Kernel) and not run.whole:
        rows, multiply = run.prepare(x, weights[0])
        call = lambda rows, weights: one_by_one(lambda w: multiply(rows, w), weights)  # noqa: E731
        return call, (rows, weights), len(weights)
    pairs = [(jnp.copy(x), w) for w in weights]  # or XLA would quantize rows once
    return (lambda pairs: one_by_one(lambda pair: run(*pair), pairs)), (pairs,), len(weights)


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, fp32 products of the first and the last outputs, rows in e4m3 and as they are)."""
    x, w = args["x"], args["weights"][0]
    return {"random": ([x, w], _products(x, w))}


@jax.jit
def _products(x: jax.Array, w: QTensor) -> list[jax.Array]:
    flat = QTensor(
        w.values.reshape(-1, w.shape[-1]),
        w.scales.reshape(-1, w.scales.shape[-1]),
        FP8_BLOCK.block,
        FP8_BLOCK.format,
    )
    real = dequantise(flat)
    ends = jnp.concatenate([real[:CHECKED], real[-CHECKED:]])
    rows = dequantise(quantise(x, FP8_TILE))
    return [jnp.matmul(a.astype(jnp.float32), ends.T, precision="highest") for a in (rows, x)]


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any]]) -> dict[str, float]:
    """Relative errors against rows as this implementation takes them.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    [operands, (rounded, plain)] = answers["random"]
    out = jax.jit(run)(*operands).reshape(operands[0].shape[0], -1)
    want = rounded if isinstance(run, Kernel) else plain
    error = float(
        relative_error(jnp.concatenate([out[:, :CHECKED], out[:, -CHECKED:]], axis=1), want)
    )
    if not error <= TOLERANCE:
        raise ValueError(f"{case}: results are off by {error:.3g} of their size")
    return {"random": error}


def flops(case: Case) -> float:
    """Multiplications and additions."""
    return 2.0 * math.prod(case.tokens) * case.k * math.prod(case.lead)


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Weights and rows once, in bf16, results once."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(args["weights"][0]))
    return weights + 2.0 * math.prod(case.tokens) * (case.k + math.prod(case.lead))
