"""`grouped_matmul` of bf16 arrays and its gradients for `benchmarks.kernels`: inputs of a case on
the device, check and figures.

The time of "mosaic_sm90" is that of the kernel alone, the list of work being there; "mosaic_sm90
op" makes it too. One set of inputs is several times the L2 cache.
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

from benchmarks.kernel_grouped_matmul import TOLERANCE
from pallas_kernels.grouped_matmul import mosaic_sm90_bf16, xla
from pallas_kernels.grouped_matmul.cases import BENCH, GRADIENTS, Case, Gradient
from pallas_kernels.grouped_matmul.tiles import Tiles, bf16_tiles, weight_gradient_tiles
from pallas_kernels.testing.bench import relative_error
from pallas_kernels.testing.generate import group_sizes

CASES = (*(case for case in BENCH if case.weight == "array"), *GRADIENTS)
MATMUL = "matmul_tflops"
"""The ceiling of its products."""
CHECKED = 4
"""Experts that are checked, those with the most rows."""
SMEM = 231 * 1024
"""Bytes of shared memory that tiles may fill."""

# Microseconds on another H100 80GB HBM3 on 2026-11-22, whose ceilings were 738 TFLOP/s (bf16 8192^3
# by XLA) and 3120 GB/s (reading): SGLang 0.5.10's fused_moe in Triton, other draws of experts.
_TRITON = "SGLang Triton"
REFERENCES = {
    "bf16 V3 gate/up t1": {_TRITON: 162},
    "bf16 V3 down t1": {_TRITON: 84},
    "bf16 V3 gate/up t128": {_TRITON: 4825},
    "bf16 V3 down t128": {_TRITON: 2414},
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def product_of(case: Case | Gradient) -> Case:
    """The product that a case is, or is a gradient of."""
    return case.case if isinstance(case, Gradient) else case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """The Hopper kernel of a case with these tiles, a function of its operands and group sizes.

    Attributes:
        of: "out", or the argument whose gradient it is.
        tiles: None for the usual ones.
        whole: time the whole op.
    """

    of: str
    tiles: Tiles | None = None
    whole: bool = False

    def __call__(self, a: Any, b: Any, sizes: jax.Array) -> jax.Array:
        """The op."""
        if self.of != "out":
            return mosaic_sm90_bf16.GRADIENTS[self.of](a, b, sizes, tiles=self.tiles)
        return mosaic_sm90_bf16.grouped_matmul(a, b, sizes, tiles=self.tiles)

    def prepared(self, a: jax.Array, b: jax.Array, sizes: jax.Array) -> tuple[Any, Any]:
        """(The list of work, None where there is none; the kernel as a function with it last)."""
        if self.of == "w":
            return None, lambda a, b, sizes, _: self(a, b, sizes)
        transposed = self.of == "x"
        flat = b.reshape(len(b), -1, b.shape[-1])
        outputs = flat.shape[2 if transposed else 1]
        tiles = self.tiles or bf16_tiles(len(a), len(b), outputs)
        work = jax.jit(mosaic_sm90_bf16.prepare, static_argnums=2)(a, sizes, tiles)

        def run(a: jax.Array, b: jax.Array, sizes: jax.Array, work: Any) -> jax.Array:
            return mosaic_sm90_bf16.multiply_rows(
                a, b.reshape(flat.shape), sizes, transposed=transposed, work=work, tiles=tiles
            )

        return work, run


def make(case: Case | Gradient, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device: both operands and group sizes."""
    product, keys = product_of(case), jax.random.split(jax.random.key(seed), 3)
    outputs = math.prod(product.lead)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: jax.Array, experts: int, shape: tuple[int, ...]) -> jax.Array:
        one = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
        return jax.lax.map(one, jax.random.split(key, experts))

    x, grad = (
        functools.partial(normal, key, 1, (product.rows, width))
        for key, width in zip(keys[:2], (product.k, outputs), strict=True)
    )
    w = functools.partial(normal, keys[2], product.experts, (outputs, product.k))
    first, second = {"out": (x, w), "x": (grad, w), "w": (grad, x)}[of(case)]
    rng = np.random.default_rng(seed)
    sizes = group_sizes(rng, product.rows, product.experts, product.load)
    both = [made[0] if len(made) == 1 else made for made in (first(), second())]
    return {"operands": [*both, jnp.asarray(sizes)]}


def of(case: Case | Gradient) -> str:
    """See `Kernel.of`."""
    return case.of if isinstance(case, Gradient) else "out"


def implementations(
    case: Case | Gradient, sweep: bool, others: bool
) -> Iterator[tuple[str, Callable[..., jax.Array], Tiles | None]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    yield "mosaic_sm90", Kernel(of=of(case)), usual_tiles(case)
    if of(case) != "w":
        yield "mosaic_sm90 op", Kernel(of=of(case), whole=True), None
    if others:
        yield "xla", functools.partial(_xla, of(case)), None
    if sweep:
        for tiles in other_tiles(case):
            yield f"mosaic_sm90 {_words(tiles)}", Kernel(of=of(case), tiles=tiles), tiles


def _xla(of: str, a: jax.Array, b: jax.Array, sizes: jax.Array) -> jax.Array:
    if of == "out":
        return xla.grouped_matmul(a, b, sizes)
    zeros = jnp.zeros
    if of == "x":
        x = zeros((len(a), b.shape[-1]), a.dtype)
        return jax.vjp(lambda x: xla.grouped_matmul(x, b, sizes), x)[1](a)[0]
    w = zeros((len(sizes), a.shape[1], b.shape[1]), a.dtype)
    return jax.vjp(lambda w: xla.grouped_matmul(b, w, sizes), w)[1](a)[0]


def usual_tiles(case: Case | Gradient) -> Tiles:
    """Those that the op chooses."""
    product = product_of(case)
    columns = math.prod(product.lead) if of(case) == "out" else product.k
    if of(case) == "w":
        return weight_gradient_tiles(columns)
    return bf16_tiles(product.rows, product.experts, columns)


def other_tiles(case: Case | Gradient) -> Iterator[Tiles]:
    """What a sweep tries."""
    product, usual = product_of(case), usual_tiles(case)
    mean = product.rows / product.experts
    tried = _for_many() if of(case) == "w" or mean > 64 else _for_few(mean)
    return (tiles for tiles in tried if tiles != usual)


def _for_many() -> Iterator[Tiles]:
    for outputs, deep, staged, registers, barriers in itertools.product(
        (256, 192, 128), (1, 2), (2, 4), ((40, 232), (24, 240)), (True, False)
    ):
        stages = (SMEM - staged * 2 * 8192) // (deep * 128 * (128 + outputs))
        if stages >= 2 and staged * 64 <= outputs:
            yield Tiles(
                rows=128,
                outputs=outputs,
                deep=deep,
                stages=min(stages, 7),
                staged=staged,
                registers=registers,
                auto_barriers=barriers,
            )


def _for_few(mean: float) -> Iterator[Tiles]:
    for rows, deep, per_sm, barriers in itertools.product(
        (8, 16, 32, 64), (1, 2, 4), (1, 2), (True, False)
    ):
        stages = (SMEM // per_sm - rows * 256 - 1024) // (deep * 128 * (128 + rows))
        if stages >= 2 and mean <= rows <= max(2 * mean, 16):
            yield Tiles(rows=rows, deep=deep, stages=stages, per_sm=per_sm, auto_barriers=barriers)


def _words(tiles: Tiles) -> str:
    changed = {
        field.name: value
        for field in dataclasses.fields(tiles)
        if (value := getattr(tiles, field.name)) != field.default
    }
    return " ".join(f"{name} {value}" for name, value in changed.items())


def every_layer(run: Any, case: Case | Gradient, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op once; what it takes; 1)."""
    del case
    operands = args["operands"]
    if not isinstance(run, Kernel) or run.whole:
        return run, operands, 1
    work, kernel = run.prepared(*operands)
    return kernel, [*operands, work], 1


def answers(case: Case | Gradient, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, {part of the result: fp32 products}) for the experts with the most rows."""
    a, b, sizes = args["operands"]
    counts = np.asarray(sizes)
    starts, found = np.cumsum(counts) - counts, {}
    for expert in (int(e) for e in np.argsort(-counts, kind="stable")[:CHECKED] if counts[e]):
        rows = slice(int(starts[expert]), int(starts[expert] + counts[expert]))
        if of(case) == "w":
            found[expert, expert + 1] = _fp32_product(a[rows].T, b[rows])[None]
        else:
            weight = b[expert] if of(case) == "x" else b[expert].T
            found[rows.start, rows.stop] = _fp32_product(a[rows], weight)
    return {"random": ([a, b, sizes], found)}


@jax.jit
def _fp32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def check(
    run: Any, case: Case | Gradient, answers: dict[str, tuple[list[Any], Any]]
) -> dict[str, float]:
    """Relative errors against `answers`, the worst of the experts.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    errors, compiled = {}, jax.jit(run)
    for name, (operands, want) in answers.items():
        nan = jnp.full(jax.eval_shape(run, *operands).shape, jnp.nan, jnp.bfloat16)
        jax.block_until_ready(nan)
        del nan  # what a kernel leaves unwritten should hold no right answer
        out = compiled(*operands)
        for (begin, end), values in want.items():
            error = float(relative_error(out[begin:end].reshape(values.shape), values))
            errors[name] = max(errors.get(name, 0.0), error)
            if not error <= TOLERANCE:
                raise ValueError(f"{case}: {begin}..{end} are off by {error:.3g} of their size")
    return errors


def flops(case: Case | Gradient) -> float:
    """Multiplications and additions that the definition asks for: as many for each of the three."""
    product = product_of(case)
    return 2.0 * product.rows * product.k * math.prod(product.lead)


def bytes_moved(case: Case | Gradient, args: dict[str, Any]) -> float:
    """Rows once; the weights of experts with rows once, or the gradients of all."""
    product, outputs = product_of(case), math.prod(product_of(case).lead)
    busy = float((args["operands"][2] > 0).sum()) if of(case) != "w" else product.experts
    return 2 * (product.rows * (product.k + outputs) + busy * outputs * product.k)
