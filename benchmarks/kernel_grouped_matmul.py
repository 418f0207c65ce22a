"""`grouped_matmul` with quantized weights for `benchmarks.kernels`: inputs of a case on the device,
check and figures.

The time of "mosaic_sm90" is that of the kernel alone, on rows that are prepared: what it is for the
others cited here. "mosaic_sm90 op" is the whole op, with the list of work and the scales of the
rows put in order.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import pack, xla
from pallas_kernels.grouped_matmul.api import hopper_kernel
from pallas_kernels.grouped_matmul.cases import BENCH, Case
from pallas_kernels.grouped_matmul.packed_int4 import unpacked
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.quant import (
    FP8_BLOCK,
    FP8_TILE,
    FP8_TOKEN,
    INT4_GROUP,
    dequantise,
    quantise,
)
from pallas_kernels.testing.bench import relative_error
from pallas_kernels.testing.generate import group_sizes

CASES = tuple(case for case in BENCH if case.weight != "array")
SET_BYTES = 2**29
"""Sets of weights are added until they are at least this large: ten times the L2 cache."""
MATMUL = "fp8_tflops"
"""The ceiling of its products."""
TOLERANCE = 5e-3
"""Of |got - want| / |want|. bf16 results: 1.7e-3 is usual."""
CHECKED = 8
"""Experts whose rows are checked, those with the most rows."""

# Microseconds on another H100 80GB HBM3 on 2026-11-22, in CUDA graphs, two sets of inputs by turns.
# That card's ceilings were 738 TFLOP/s (bf16 8192^3 by XLA), 1378 TFLOP/s (e4m3 8192^3 by PyTorch's
# _scaled_mm) and 3120 GB/s (reading). DeepGEMM: deepseek-ai 54e2261, fp8 with these scales, the
# better of masked and contiguous.
_DEEPGEMM = "DeepGEMM"
_FP8 = {
    "gate/up": {1: 87, 32: 86, 128: 90, 512: 200, 4096: 1479},
    "down": {1: 50, 32: 48, 128: 54, 512: 108, 4096: 812},
}
# SGLang 0.5.10's Marlin: int4 with a scale per 128, as here, but bf16 rows. Of all 256 experts its
# draws hit 54, 167, 255 and 256.
_MARLIN = "Marlin"
_INT4 = {
    "gate/up 8": {1: 49, 32: 93, 128: 209, 512: 792},
    "down 8": {1: 32, 32: 57, 128: 130, 512: 460},
    "gate/up 256": {8: 295, 32: 856, 128: 1385, 512: 1951},
    "down 256": {8: 157, 32: 449, 128: 715, 512: 1010},
}
REFERENCES = {
    f"e4m3 {name} 8 experts t{tokens}": {_DEEPGEMM: us}
    for name, times in _FP8.items()
    for tokens, us in times.items()
} | {
    f"int4 {name} experts t{tokens}": {_MARLIN: us}
    for name, times in _INT4.items()
    for tokens, us in times.items()
}
REFERENCE_CEILINGS = {"fp8_tflops": 1378.0, "read_gbs": 3120.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """The Hopper kernel with these tiles.

    Attributes:
        tiles: None for the usual ones.
        whole: time the whole op.
    """

    tiles: Tiles | None = None
    whole: bool = False

    def __call__(self, x: Any, w: Any, sizes: jax.Array) -> jax.Array:
        """The op."""
        return hopper_kernel(w).grouped_matmul(x, w, sizes, tiles=self.tiles)

    def prepare(self, x: Any, w: Any, sizes: jax.Array) -> tuple[Any, Callable[..., jax.Array]]:
        """(Rows as the kernel reads them; the kernel as a function of these and of weights)."""
        kernel = hopper_kernel(w)
        tiles = self.tiles or kernel.usual_tiles(x, w)
        prepared = jax.jit(kernel.prepare, static_argnums=2)(x, sizes, tiles)
        return prepared, functools.partial(kernel.multiply, tiles=tiles)


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device: x and group sizes, and several sets of weights."""
    of_rows, of_weights = (FP8_TOKEN, INT4_GROUP) if case.packed else (FP8_TILE, FP8_BLOCK)
    keys = iter(jax.random.split(jax.random.key(seed), 99))

    def tensor(key: jax.Array, shape: tuple[int, ...], recipe: Any) -> Any:
        made = quantise(jax.random.normal(key, shape, jnp.bfloat16), recipe)
        return pack(made, full_range=case.full_range) if made.format == "int4" else made

    @jax.jit
    def weights(key: jax.Array) -> Any:  # an expert at a time: its fp32 values come and go
        one = functools.partial(tensor, shape=(*case.lead, case.k), recipe=of_weights)
        return jax.lax.map(one, jax.random.split(key, case.experts))

    sizes = group_sizes(np.random.default_rng(seed), case.rows, case.experts, case.load)
    first = weights(next(keys))
    sets = max(1, -(-SET_BYTES // _bytes(first)))
    return {
        "x": jax.jit(tensor, static_argnums=(1, 2))(next(keys), (case.rows, case.k), of_rows),
        "weights": [first, *(weights(next(keys)) for _ in range(sets - 1))],
        "sizes": jnp.asarray(sizes),
    }


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    args = case.abstract()
    usual = hopper_kernel(args["w"]).usual_tiles(args["x"], args["w"])
    yield "mosaic_sm90", Kernel(), usual
    yield "mosaic_sm90 op", Kernel(whole=True), None
    if others:
        yield "xla", xla.grouped_matmul, None
    if sweep:
        for tiles in _other_int4_tiles(case) if case.packed else _other_fp8_tiles(case):
            if tiles != usual:
                yield f"mosaic_sm90 {_words(tiles)}", Kernel(tiles=tiles), tiles


def _other_fp8_tiles(case: Case) -> Iterator[Tiles]:
    mean = case.rows / case.experts
    if mean <= 64:
        rows = [n for n in (8, 16, 32, 64) if mean <= n <= 4 * max(mean, 8)]
        for size, deep, stages, barriers in itertools.product(
            rows, (1, 2), (4, 5, 6, 8, 10), (False, True)
        ):
            if 180 < stages * deep * (size + 128) / 8 <= 220:
                yield Tiles(rows=size, deep=deep, stages=stages, auto_barriers=barriers)
    if mean >= 32:
        for together, stages, cluster in itertools.product((1, 2, 4, 8), (4, 5), (1, 2)):
            if case.k // 128 % together == 0:
                yield Tiles(
                    rows=128,
                    together=together,
                    stages=stages,
                    registers=(40, 232),
                    cluster=cluster,
                )


def _other_int4_tiles(case: Case) -> Iterator[Tiles]:
    mean = case.rows / case.experts
    for rows, (deep, together), per_sm, barriers in itertools.product(
        (8, 16, 32, 64, 128), ((1, 2), (1, 4), (1, 8), (2, 1), (2, 2)), (1, 2), (False, True)
    ):
        registers = (24, 240) if rows >= 64 else None
        stages = (225 // per_sm - rows // 4) * 1024 // (deep * (8704 + 128 * rows))
        few, many = mean <= rows <= max(2 * mean, 16), rows <= 2 * mean
        if (
            stages > min(2, together)
            and (few or many and rows >= 64)
            and not (registers and per_sm > 1)
        ):
            yield Tiles(
                rows=rows,
                deep=deep,
                together=together,
                stages=min(stages, 16),
                per_sm=per_sm,
                registers=registers,
                auto_barriers=barriers,
            )


def _words(tiles: Tiles) -> str:
    changed = {
        field.name: value
        for field in dataclasses.fields(tiles)
        if (value := getattr(tiles, field.name)) != field.default
    }
    return " ".join(f"{name} {value}" for name, value in changed.items())


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each set of weights; what it takes; how many sets)."""
    x, weights, sizes = args["x"], args["weights"], args["sizes"]
    if isinstance(run, Kernel) and not run.whole:
        prepared, multiply = run.prepare(x, weights[0], sizes)
        call = lambda rows, weights: [multiply(rows, w) for w in weights]  # noqa: E731
        return call, (prepared, weights), len(weights)

    # Other rows and sizes for each, or XLA would prepare them once.
    xs, each = ([jax.tree.map(jnp.copy, value) for _ in weights] for value in (x, sizes))

    def function(xs: Any, weights: Any, each: Any) -> Any:
        return [run(*operands) for operands in zip(xs, weights, each, strict=True)]

    return function, (xs, weights, each), len(weights)


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, {first row: result}) of fp32 products for the experts with the most rows."""
    x, w, sizes = args["x"], args["weights"][0], np.asarray(args["sizes"])
    starts, found = np.cumsum(sizes) - sizes, {}
    for expert in np.argsort(-sizes, kind="stable")[:CHECKED]:
        if sizes[expert]:
            rows = slice(starts[expert], starts[expert] + sizes[expert])
            one = jax.tree.map(lambda leaf, expert=expert: leaf[expert], w)
            found[int(starts[expert])] = _product(x[rows], one)
    return {"random": ([x, w, args["sizes"]], found)}


@jax.jit
def _product(x: Any, w: Any) -> jax.Array:
    flat = dequantise(unpacked(w)).reshape(-1, w.shape[-1])
    return jnp.matmul(dequantise(x), flat.T, precision="highest")


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any]]) -> dict[str, float]:
    """Relative errors against `answers`, the worst of the experts.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    errors, compiled = {}, jax.jit(run)
    for name, (operands, want) in answers.items():
        outputs = math.prod(case.lead)
        nan = jnp.full((case.rows, outputs), jnp.nan, jnp.bfloat16)
        jax.block_until_ready(nan)
        del nan  # what a kernel leaves unwritten should hold no right answer
        out = compiled(*operands).reshape(case.rows, outputs)
        for row, values in want.items():
            error = float(relative_error(out[row : row + len(values)], values))
            errors[name] = max(errors.get(name, 0.0), error)
            if not error <= TOLERANCE:
                raise ValueError(f"{case}: rows from {row} are off by {error:.3g} of their size")
    return errors


def flops(case: Case) -> float:
    """Multiplications and additions that the definition asks for."""
    return 2.0 * case.rows * case.k * math.prod(case.lead)


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """The weights of experts with rows once, rows and results once."""
    share = float((args["sizes"] > 0).mean())
    results = 2 * case.rows * math.prod(case.lead)
    return share * _bytes(args["weights"][0]) + _bytes(args["x"]) + results


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
