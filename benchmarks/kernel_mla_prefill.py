"""`mla_prefill` for `benchmarks.kernels`: random rows on the device, a check, and figures."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_prefill import api, mosaic_sm90, reference
from pallas_kernels.mla_prefill.block_list import BlockList, visible
from pallas_kernels.mla_prefill.cases import BENCH, Case
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import QUERY_TILE, Tiles
from pallas_kernels.testing.bench import relative_error

CASES = BENCH
MATMUL = "matmul_tflops"
TOLERANCE = 1e-2
"""Of |got - want| / |want|: bf16 results of bf16 products are off by 2e-3 to 4e-3."""
PEAK = 4.0
"""Queries are multiplied with it for a second check, where maxima grow from tile to tile."""
QUERIES = ("q_nope", "q_rope")
NAMES = (*QUERIES, "k_nope", "k_rope", "v", "plan", "blocks")

# Microseconds on another H100 80GB HBM3 on 2026-11-22, whose ceilings were as below. All of them
# are causal with 128 heads of 192 channels; "padded" has values of 192 channels too, as jax.nn
# wants them. cuDNN 9.19; FlashAttention-2 through torch 2.11.
REFERENCES = {
    "deepseek-v3 b1 t4096": {
        "cuDNN by torch": 1162,
        "cuDNN by jax.nn, padded": 1456,
        "FlashAttention-2, padded": 2691,
    },
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device; they are larger than the L2 cache."""
    shapes, keys = case.abstract(), iter(jax.random.split(jax.random.key(seed), 5))
    args: dict[str, Any] = {
        name: jax.random.normal(next(keys), shape.shape, shape.dtype)
        for name, shape in shapes.items()
        if name not in ("plan", "blocks")
    }
    plan = case.plan(*(jnp.asarray(a) for a in case.plan_arrays(seed)))
    return args | {"plan": plan, "blocks": jax.jit(case.blocks)(plan, args)}


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any]]:
    """(name, function of the op's arguments)."""
    yield "mosaic_sm90", mosaic_sm90.mla_prefill
    if case.top is not None:
        yield "mosaic_sm90 and its list", functools.partial(_listed, case)
    listed = case.a_shape is not None or case.top is not None
    if others and not listed:
        yield "cudnn", functools.partial(api.mla_prefill, impl="cudnn", with_lse=False)
    if sweep:
        for (keys, slots), ping_pong in itertools.product(((128, 2), (64, 4)), (True, False)):
            tiles = Tiles(keys=keys, slots=slots, ping_pong=ping_pong)
            if not listed or keys == 128:  # the tile of its list
                name = f"mosaic_sm90 keys {keys} slots {slots} ping-pong {ping_pong}"
                yield name, functools.partial(mosaic_sm90.mla_prefill, tiles=tiles)


def _listed(case: Case, *, blocks: Any, **args: Any) -> Any:
    """Makes the list too, where all others get it."""
    return mosaic_sm90.mla_prefill(**args, blocks=case.blocks(args["plan"], args))


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op once; what it takes; 1)."""
    return _compiled(run, case), args.values(), 1


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any, Any]]:
    """(operands, out and lse of `_sample` by the fp32 reference), for random and peaked scores."""
    found, (rows, heads) = {}, _sample(case)
    tiles = rows[::QUERY_TILE] // QUERY_TILE
    for name, factor in (("random", 1.0), ("peaked", PEAK)):
        changed = args | {k: args[k] * jnp.bfloat16(factor) for k in QUERIES}
        if case.top is not None:
            changed["blocks"] = jax.jit(case.blocks)(args["plan"], changed)
        few = changed | {k: changed[k][:, heads] for k in (*QUERIES, "k_nope", "v")}
        few |= {k: few[k][rows] for k in QUERIES}
        if case.rows == 1:
            plan = args["plan"]
            few["plan"] = MlaPrefillPlan(
                plan.query_seq[rows], plan.query_pos[rows], plan.key_seq, plan.key_pos
            )
        if (blocks := changed["blocks"]) is not None:
            of = heads if blocks.counts.shape[0] > 1 else np.zeros(1, int)
            listed, counts = (x[of][:, tiles] for x in (blocks.tiles, blocks.counts))
            few["blocks"] = BlockList(listed, counts, blocks.key_tile)
        with jax.default_matmul_precision("highest"):
            want = _compiled(reference.mla_prefill, case)(*few.values())
        found[name] = list(changed.values()), *want
    return found


def _sample(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Queries and heads that are checked: of long prompts eight tiles, the first and the last too;
    two heads.
    """
    tokens = case.rows * case.queries
    tiles = np.arange(-(-tokens // QUERY_TILE))
    if case.rows == 1 and not tokens % QUERY_TILE:
        tiles = np.unique(np.linspace(0, tiles[-1], 8).astype(int))
    rows = (tiles[:, None] * QUERY_TILE + np.arange(QUERY_TILE)).reshape(-1)
    return rows[rows < tokens], np.asarray([0, case.heads * 3 // 5])


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any, Any]]) -> dict[str, float]:
    """Relative errors against `answers`; an implementation without log-sum-exp has one less.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    errors, (rows, heads), compiled = {}, _sample(case), _compiled(run, case)
    for name, (operands, *want) in answers.items():
        nan = jnp.full(operands[0].shape, jnp.nan, jnp.bfloat16)
        jax.block_until_ready(nan)
        del nan  # what a kernel leaves unwritten should hold no right answer
        for part, g, w in zip(("out", "lse"), compiled(*operands), want, strict=True):
            if g is None:
                continue
            error = float(relative_error(g[rows][:, heads], w))
            errors[f"{name} {part}"] = error
            if not error <= TOLERANCE:
                raise ValueError(f"{case}, {name}: {part} is off by {error:.3g} of its size")
    return errors


def _compiled(run: Any, case: Case) -> Any:
    def function(*operands: Any) -> Any:
        args = dict(zip(NAMES, operands, strict=True))
        blocks = args.pop("blocks")
        options = {} if blocks is None else {"blocks": blocks}
        return run(**args, scale=case.scale, **options)

    return jax.jit(function)


def flops(case: Case) -> float:
    """Multiplications and additions that the definition asks for: of keys that are seen."""
    seen: float = sum(new * prefix + new * (new + 1) / 2 for prefix, new in case.chunks)
    if case.top is not None:  # tiles of one prompt, whole ones and the diagonal
        whole = np.minimum(np.arange(case.queries // QUERY_TILE), case.top)
        seen = float((whole * QUERY_TILE**2 + QUERY_TILE * (QUERY_TILE + 1) / 2).sum())
    elif case.a_shape is not None:
        plan = case.plan(*(jnp.asarray(a) for a in case.plan_arrays(0)))
        seen = float(jax.jit(_count_seen)(plan, case.blocks(plan, {})))
    return 2.0 * case.heads * seen * (case.nope + case.rope + case.value)


def _count_seen(plan: MlaPrefillPlan, blocks: BlockList) -> jax.Array:
    return visible(plan, blocks).sum(axis=-1).astype(jnp.float32).sum()


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Queries, keys, values and results once."""
    arrays = [args[name] for name in (*QUERIES, "k_nope", "k_rope", "v", "q_nope")]
    return float(sum(x.size * x.dtype.itemsize for x in arrays))
