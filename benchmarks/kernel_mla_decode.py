"""`mla_decode` for `benchmarks.kernels`: inputs of a case on the device, its check, its figures."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.mla_decode import mosaic_sm90, plan_mla_decode, reference, xla
from pallas_kernels.mla_decode.cases import BENCH, Case, in_e4m3
from pallas_kernels.mla_decode.plan import with_work
from pallas_kernels.mla_decode.tiles import Tiles
from pallas_kernels.quant import FP8_TILE, quantise
from pallas_kernels.select import count_sms
from pallas_kernels.testing.bench import relative_error

CASES = BENCH
POOL_BYTES = 2**28
"""Layers are added to the pool until it is at least this large: five times the L2 cache."""
PEAK = 4.0
"""Queries are multiplied with it for a second check, where maxima grow from page to page."""
CHECKED = 8
"""Sequences that are checked, of the whole."""
MATMUL = "matmul_tflops"
"""The ceiling of its products: bf16, also with an fp8 cache."""
TOLERANCE = 1e-2
"""Of |got - want| / |want|. bf16 results, products of bf16 operands: 1e-3 to 3e-3 are usual."""

# Microseconds on another H100 80GB HBM3 on 2026-11-22, in CUDA graphs. That card's ceilings were
# 738 TFLOP/s (bf16 8192^3 by XLA) and 3120 GB/s (reading). FlashMLA: deepseek-ai 9241ae3, dense
# bf16. FlashMLA fp8 qkv: vllm-project 46d64a8, queries and cache e4m3 with one scale. FlashMLA
# sparse: all tokens chosen, e4m3 latents with a scale per 128 channels, bf16 products. FlashInfer:
# 0.7.2.post1, fa3.
_FLASHMLA, _FLASHINFER = "FlashMLA", "FlashInfer"
_FP8, _SPARSE = "FlashMLA fp8 qkv", "FlashMLA sparse fp8 kv"
REFERENCES = {
    "b128 kv4096 q1": {_FLASHMLA: 245, _FLASHINFER: 263},
    "b128 kv4096 q2": {_FLASHMLA: 469, _FLASHINFER: 487},
    "b128 kv4096 q3": {_FLASHMLA: 696, _FLASHINFER: 788},
    "b32 kv8192 q1": {_FLASHMLA: 132, _FLASHINFER: 142},
    "b32 kv8192 q2": {_FLASHMLA: 214, _FLASHINFER: 241},
    "b256 kv1024 q1": {_FLASHMLA: 155, _FLASHINFER: 160},
    "b256 kv1024 q2": {_FLASHMLA: 279, _FLASHINFER: 293},
    "b128 kv4096 q1 fp8": {_FP8: 237, _SPARSE: 351},
    "b128 kv4096 q2 fp8": {_FP8: 520},
    "b32 kv8192 q1 fp8": {_FP8: 118, _SPARSE: 182},
    "b256 kv1024 q1 fp8": {_FP8: 145, _SPARSE: 195},
    "b128 kv4096 q1 fp8_tensor": {_FP8: 237},
    "b128 kv4096 q2 fp8_tensor": {_FP8: 520},
    "b32 kv8192 q1 fp8_tensor": {_FP8: 118},
    "b256 kv1024 q1 fp8_tensor": {_FP8: 145},
    "b128 kv64-8633 q1": {_FLASHMLA: 269},
    "b128 kv64-8633 q1 fp8_tensor": {_FP8: 236},
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device, in a pool of several layers; every page is used once."""
    length = sum(-(-n // case.page_size) for n in case.lens)
    wide = dataclasses.replace(case, num_pages=length, width=max(-(-n // 64) for n in case.lens))
    one = sum(_bytes(x) for x in jax.tree.leaves(wide.abstract()["cache"]))
    wide = dataclasses.replace(wide, layers=max(1, -(-POOL_BYTES // one)))
    shapes, keys = wide.abstract(), iter(jax.random.split(jax.random.key(seed), 8))

    def normal(shape: Any) -> jax.Array:
        return jax.random.normal(next(keys), shape.shape, jnp.bfloat16)

    queries = normal(shapes["q_latent"]), normal(shapes["q_rope"])
    latent, rope = normal(shapes["cache"].latent), normal(shapes["cache"].rope)
    cache = LatentCache(latent, rope)
    if case.kv == "fp8_tensor":
        e4m3 = jnp.float8_e4m3fn  # random numbers are far below 448
        cache = LatentCache(latent.astype(e4m3), rope.astype(e4m3), jnp.ones(wide.layers))
        queries = tuple(q.astype(jnp.bfloat16) for q in in_e4m3(*queries, 3.5))
    if case.kv == "fp8":
        quantised = jax.jit(quantise, static_argnums=1)(latent, FP8_TILE)
        cache = LatentCache(quantised.values, rope, quantised.scales)
    table = _page_table(case, length, shapes["page_table"].shape[1], seed)
    lens = jnp.asarray(case.lens, jnp.int32)
    rows = sum(case.queries)
    starts = jnp.arange(len(case.lens) + 1, dtype=jnp.int32) * case.queries[0]
    return {
        "q_latent": queries[0],
        "q_rope": queries[1],
        "cache": cache,
        "page_table": table,
        "plan": _planned(lens, starts, table, rows, case.queries[0], case.heads),
    }


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _planned(
    lens: jax.Array, starts: jax.Array, table: jax.Array, rows: int, queries: int, heads: int
) -> Any:
    plan = plan_mla_decode(lens, starts, rows, queries=queries)
    return with_work(plan, table, heads, count_sms())


def _page_table(case: Case, pages: int, width: int, seed: int) -> jax.Array:
    order = np.random.default_rng(seed).permutation(pages)
    table, at = np.zeros((len(case.lens), width), np.int32), 0
    for row, length in enumerate(case.lens):
        count = -(-length // case.page_size)
        table[row, :count] = order[at : at + count]
        at += count
    return jnp.asarray(table)


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    usual = Tiles(registers=mosaic_sm90.BLOCKS[case.kv].registers)
    yield "mosaic_sm90", mosaic_sm90.mla_decode, usual
    if others:
        yield "xla", xla.mla_decode, None
    if sweep:
        registers, columns, barriers = (
            ((184, 160), (168, 168), (152, 176)),
            (64, 128, 256),
            (False, True),
        )
        for choice in itertools.product(registers, columns, barriers):
            tiles = Tiles(registers=choice[0], value_columns=choice[1], auto_barriers=choice[2])
            own = case.kv == "fp8_tensor"  # which has columns of its own
            if tiles != usual and (not own or choice[1] == 128):
                name = f"mosaic_sm90 {choice[0]} columns {choice[1]} barriers {choice[2]}"
                yield name, functools.partial(mosaic_sm90.mla_decode, tiles=tiles), tiles


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer of the pool, as a model does; what it takes; the
    number of layers).
    """
    layers = args["cache"].latent.shape[0]

    def function(q_latent: Any, q_rope: Any, cache: Any, page_table: Any, plan: Any) -> Any:
        args = (page_table, plan)
        return [run(q_latent, q_rope, cache, i, *args, scale=case.scale) for i in range(layers)]

    return function, args.values(), layers


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any, Any]]:
    """(operands, which rows, their fp32 reference) for random and for peaked scores."""
    found, run = {}, _at_layer(reference.mla_decode, case.scale)
    sequences = np.arange(0, len(case.lens), max(1, len(case.lens) // CHECKED))
    rows = (sequences[:, None] * case.queries[0] + np.arange(case.queries[0])).ravel()
    lens = jnp.asarray(case.lens, jnp.int32)[sequences]
    starts = jnp.arange(len(sequences) + 1, dtype=jnp.int32) * case.queries[0]
    few = {
        "page_table": args["page_table"][sequences],
        "plan": plan_mla_decode(lens, starts, len(rows), queries=case.queries[0]),
    }
    for name, factor in (("random", 1.0), ("peaked", PEAK)):
        changed = args | {k: args[k] * jnp.bfloat16(factor) for k in ("q_latent", "q_rope")}
        those = changed | few | {k: changed[k][rows] for k in ("q_latent", "q_rope")}
        with jax.default_matmul_precision("highest"):
            found[name] = list(changed.values()), rows, run(*those.values())
    return found


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any, Any]]) -> dict[str, float]:
    """Relative errors against `answers`.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    errors, compiled = {}, _at_layer(run, case.scale)
    for name, (operands, rows, want) in answers.items():
        nan = jnp.full(operands[0].shape, jnp.nan, jnp.bfloat16)
        jax.block_until_ready(nan)
        del nan  # what a kernel leaves unwritten should hold no right answer
        for part, g, w in zip(("out", "lse"), compiled(*operands), want, strict=True):
            error = float(relative_error(g[rows], w))
            errors[f"{name} {part}"] = error
            if not error <= TOLERANCE:
                raise ValueError(f"{case}, {name}: {part} is off by {error:.3g} of its size")
    return errors


def _at_layer(run: Any, scale: float) -> Any:
    def function(q_latent: Any, q_rope: Any, cache: Any, page_table: Any, plan: Any) -> Any:
        layer = cache.latent.shape[0] - 1
        return run(q_latent, q_rope, cache, layer, page_table, plan, scale=scale)

    return jax.jit(function)


def flops(case: Case) -> float:
    """Multiplications and additions that the definition asks for."""
    q = case.queries[0]
    seen = sum(n - q + i + 1 for n in case.lens for i in range(q))
    return 2.0 * case.heads * seen * (2 * case.latent + case.rope)


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """The cached rows of one layer once, queries and results once."""
    cache, rows = args["cache"], sum(case.lens)
    token = sum(_bytes(x) for x in jax.tree.leaves(cache)) / cache.latent[..., 0].size
    queries = _bytes(args["q_latent"]) + _bytes(args["q_rope"])
    return rows * token + queries + _bytes(args["q_latent"])


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize
