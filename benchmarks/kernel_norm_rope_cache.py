"""`norm_rope_cache` for `benchmarks.kernels`: layers that write to one small pool, check, figures.

A call copies the pool once, for all layers, because a benchmark keeps its arguments; a step gives
them away. So the pool holds little more than the new rows of a layer.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.norm_rope_cache import triton, xla
from pallas_kernels.norm_rope_cache.cases import BENCH, Case

LAYERS = 32
CASES = tuple(
    dataclasses.replace(case, pages=-(-case.rows // case.page), layers=LAYERS) for case in BENCH
)
MATMUL = "matmul_tflops"
TOLERANCE = 2e-2
"""Of |got - want| / |want|. XLA does not round latents to bf16 before it rounds them to e4m3, so
some go to the other side: 1e-2 is usual.
"""
REFERENCES: dict[str, dict[str, float]] = {}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device: q and kv of each layer, the others for all."""
    shapes = case.abstract()
    keys = iter(jax.random.split(jax.random.key(seed), 99))

    def random(like: Any) -> jax.Array:
        return jax.random.normal(next(keys), like.shape, like.dtype)

    order = jax.random.permutation(next(keys), case.pages * case.page)[: case.rows]
    order = order.astype(jnp.int32)
    return {
        "rows": [(random(shapes["q"]), random(shapes["kv"])) for _ in range(LAYERS)],
        "q_weight": random(shapes["q_weight"]),
        "kv_weight": random(shapes["kv_weight"]),
        "tables": tuple(random(table) for table in shapes["tables"]),
        "cache": jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes["cache"]),
        "places": (order // case.page, order % case.page),
    }


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, None]]:
    """(name, function of the op's arguments, None: there is no choice of tiles)."""
    yield "triton", triton.norm_rope_cache, None
    if others:
        yield "xla", xla.norm_rope_cache, None


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer, one after the other; what it takes; the number
    of layers).
    """
    return functools.partial(_layers, run), args.values(), LAYERS


def _layers(
    run: Any, rows: Any, q_weight: Any, kv_weight: Any, tables: Any, cache: Any, places: Any
) -> tuple[list[jax.Array], LatentCache]:
    queries = []
    for layer, (q, kv) in enumerate(rows):
        normed, cache = run(q, q_weight, kv, kv_weight, tables, cache, layer, *places, 1e-6)
        queries.append(normed)
    return queries, cache


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, queries of the last layer and the pool) in plain JAX."""
    operands = list(args.values())
    return {"random": (operands, _results(xla.norm_rope_cache, operands))}


def _results(run: Any, operands: list[Any]) -> dict[str, jax.Array]:
    queries, cache = jax.jit(functools.partial(_layers, run))(*operands)
    found = {"queries": queries[-1], "latent": cache.latent, "rope": cache.rope}
    return {name: x.astype(jnp.float32) for name, x in found.items()}


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any]]) -> dict[str, float]:
    """Relative errors of queries, latents and rope keys.

    Raises:
        ValueError: one is larger than the tolerance.
    """
    operands, want = answers["random"]
    got, errors = _results(run, operands), {}
    for name, values in want.items():
        errors[name] = float(jnp.linalg.norm(got[name] - values) / jnp.linalg.norm(values))
        if not errors[name] <= TOLERANCE:
            raise ValueError(f"{case}: {name} are off by {errors[name]:.3g} of their size")
    return errors


def flops(case: Case) -> float:
    """Squares, sums and two products for each channel."""
    return 4.0 * case.rows * ((case.queries or 0) + case.latent + case.rope)


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Rows once, queries and what is written once."""
    q, kv = args["rows"][0]
    cache = args["cache"]
    slots = case.layers * case.pages * case.page
    stored = sum(x.nbytes / slots for x in jax.tree.leaves(cache) if x.ndim == 4)
    return 2.0 * q.nbytes + kv.nbytes + stored * case.rows
