"""`expert_mlp` for `benchmarks.kernels`: a layer's routed experts of DeepSeek-V3, from rows and
choices to their weighted sums; one set of weights a layer.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_grouped_matmul
from benchmarks.layers import one_by_one
from pallas_kernels.expert_mlp import mosaic_sm90, xla
from pallas_kernels.expert_mlp.cases import BENCH, Case
from pallas_kernels.grouped_matmul import cases as products
from pallas_kernels.testing.bench import relative_error

CASES = tuple(case for case in BENCH if case.weight != "array")
MATMUL = "fp8_tflops"
"""The ceiling of its products."""
TOLERANCE = 5e-2
"""Of |got - want| / |want| where rows go through the experts in e4m3. What the tensor cores leave
out of a sum (they keep 14 bits) sends two or three in a hundred hidden values to the other
neighbour in e4m3, a step of a tenth: 2.4e-2 at 2048 of them.
"""
NO_WORSE = 1.3
"""How much farther from the results of unrounded rows than plain JAX a kernel may be: it has both
distances, 3.5e-2 and 2.4e-2, which have nothing to do with each other.
"""
CHECKED = 16
"""Rows that are checked, each with the weights of its own experts."""

# Microseconds on another H100 80GB HBM3 on 2026-11-22, whose ceilings were as in
# `kernel_grouped_matmul`. DeepGEMM: the two products alone, of rows that are sorted and quantized.
# Marlin: SGLang 0.5.10's fused experts, int4 weights and bf16 rows.
REFERENCES = (
    {
        f"e4m3 deepseek-v3 8 experts t{tokens}": {"DeepGEMM's two products": us}
        for tokens, us in {1: 136, 32: 134, 128: 145, 512: 308, 4096: 2291}.items()
    }
    | {
        f"int4 deepseek-v3 8 experts t{tokens}": {"Marlin": us}
        for tokens, us in {1: 85, 32: 155, 128: 351, 512: 1265}.items()
    }
    | {
        f"int4 deepseek-v3 256 experts t{tokens}": {"Marlin": us}
        for tokens, us in {8: 458, 32: 1299, 128: 2103, 512: 2968}.items()
    }
)
REFERENCE_CEILINGS = kernel_grouped_matmul.REFERENCE_CEILINGS


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device: (x, router weights, experts) of several layers, and their
    weights.
    """
    gate_up = _weights(case, (2, case.width), case.hidden, seed)
    down = _weights(case, (case.hidden,), case.width, seed + 1)
    layers = list(zip(gate_up, down, strict=False))  # of the smaller ones there are more
    keys = jax.random.split(jax.random.key(seed), 2 * len(layers))
    shape, choices = (case.rows, case.hidden), (case.rows, case.per_token)
    rng = np.random.default_rng(seed)
    return {
        "rows": [
            (
                jax.random.normal(keys[2 * i], shape, jnp.bfloat16),
                jax.random.uniform(keys[2 * i + 1], choices, jnp.float32),
                jnp.asarray(_chosen(case, rng)),
            )
            for i in range(len(layers))
        ],
        "weights": layers,
    }


def _weights(case: Case, lead: tuple[int, ...], inputs: int, seed: int) -> list[Any]:
    of_product = products.Case(
        name=str(case),
        rows=case.experts,
        experts=case.experts,
        lead=lead,
        k=inputs,
        weight=case.weight,
        x="token" if case.packed else "tile",
        packed=case.packed,
    )
    return kernel_grouped_matmul.make(of_product, seed)["weights"]


def _chosen(case: Case, rng: np.random.Generator) -> np.ndarray:
    order = np.argsort(rng.random((case.rows, case.experts)), axis=1)
    return order[:, : case.per_token].astype(np.int32)


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, None]]:
    """(name, function of the op's arguments, None: its products choose the tiles)."""
    yield "mosaic_sm90", mosaic_sm90.expert_mlp, None
    if others:
        yield "xla", xla.expert_mlp, None


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer, one after the other; what it takes; the number
    of layers).
    """

    def function(rows: Any, weights: Any) -> Any:
        operands = [(*r, *w) for r, w in zip(rows, weights, strict=True)]
        return one_by_one(lambda this: run(*this), operands)

    return function, (args["rows"], args["weights"]), len(args["rows"])


def answers(case: Case, args: dict[str, Any]) -> tuple[Any, np.ndarray, jax.Array, jax.Array]:
    """(operands, which rows, results for these of the same quantization in plain JAX, and of rows
    that are not quantized).
    """
    operands = (*args["rows"][0], *args["weights"][0])
    some = np.arange(0, case.rows, max(1, case.rows // CHECKED))
    plain = functools.partial(mosaic_sm90.expert_mlp, steps=mosaic_sm90.PLAIN)
    both = jax.jit(functools.partial(_alone, (plain, xla.expert_mlp)))
    results = [both(row, *operands) for row in some]
    same, exact = (jnp.concatenate(each) for each in zip(*results, strict=True))
    return operands, some, same, exact


def _alone(
    ops: tuple[Any, ...],
    row: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: Any,
    down: Any,
) -> list[jax.Array]:
    """One row through its experts, by each of `ops`."""
    chosen = experts[row]
    own = [jax.tree.map(lambda leaf: leaf[chosen], w) for w in (gate_up, down)]
    ids = jnp.arange(len(chosen), dtype=jnp.int32)[None]
    return [op(x[row][None], weights[row][None], ids, *own) for op in ops]


def check(
    run: Any, case: Case, answers: tuple[Any, np.ndarray, jax.Array, jax.Array]
) -> dict[str, float]:
    """The relative errors: against plain JAX, and against rows that are not quantized.

    Raises:
        ValueError: one is larger than it may be.
    """
    operands, some, want, exact = answers
    got = jax.jit(run)(*operands)[some]
    found = {"same": float(relative_error(got, want)), "exact": float(relative_error(got, exact))}
    limit = NO_WORSE * float(relative_error(want, exact))
    if run is not xla.expert_mlp and not (found["same"] <= TOLERANCE and found["exact"] <= limit):
        raise ValueError(f"{case}: {found}; expected at most {TOLERANCE} and {limit:.3g}")
    return found


def flops(case: Case) -> float:
    """Multiplications and additions of the three products."""
    return 6.0 * case.rows * case.per_token * case.hidden * case.width


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """The weights of experts with rows once, rows and results once."""
    x, _, experts = args["rows"][0]
    share = np.unique(experts).size / case.experts
    leaves = jax.tree.leaves(args["weights"][0])
    return share * sum(leaf.nbytes for leaf in leaves) + 2.0 * x.nbytes
