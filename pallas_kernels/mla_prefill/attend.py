"""The warpgroups of the Hopper kernel of `mla_prefill` that multiply: scores, softmax, values."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, ROWS, accumulator, by_row, multiply_add, row_values
from pallas_kernels.mla_prefill.block import REGISTERS, ROWS_EACH, VALUE, Block, load
from pallas_kernels.mla_prefill.tiles import QUERY_TILE

HIDDEN = -(2.0**100)
"""Score of what a query may not see: a power of two, so its product with the scale is exact."""
COLUMNS = MATRIX.reduce(0)
"""How registers hold one value for each column of a matrix."""


def run(b: Block, warpgroup: jax.Array) -> None:
    """Attends with 64 queries of the block, one for each row."""
    plgpu.set_max_registers(REGISTERS[0], action="increase")
    r, g = b.refs, b.g
    rows = pl.ds(b.tile * QUERY_TILE + warpgroup * ROWS_EACH, ROWS_EACH)
    query = load(r.query_seq.at[rows], ROWS), load(r.query_pos.at[rows], ROWS)
    plgpu.barrier_wait(r.queries_ready.at[warpgroup])
    pl.when(warpgroup == 1)(lambda: _meet(b))

    def step(index: jax.Array, carry: Any, masked: bool) -> Any:
        scores, *sums = carry
        if masked:
            scores = _mask(b, scores, query, b.key_tile(index))
        probs, out, *rest = _softmax(b, warpgroup, scores, *sums)
        out, scores = _multiply(b, warpgroup, index, probs, out)
        return scores, out, *rest

    lowest = row_values(HIDDEN) * g.exponent
    zero = plgpu.layout_cast(jnp.zeros((ROWS_EACH, VALUE), jnp.float32), MATRIX)
    carry = _first_scores(b, warpgroup), zero, lowest, row_values(0.0)
    last = b.count - 1
    full = jnp.minimum(b.full, last)
    carry = lax.fori_loop(0, full, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(full, last, functools.partial(step, masked=True), carry)
    scores, *sums = carry
    scores = _mask(b, scores, query, b.key_tile(last))
    probs, out, top, total = _softmax(b, warpgroup, scores, *sums)
    out = _last_values(b, warpgroup, probs, out)

    seen = top > lowest / 2
    lse = jnp.where(seen, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
    r.lse.at[b.head, b.tile, warpgroup][...] = lse
    out = out * by_row(jnp.where(seen, 1 / total, 0.0), out)
    plgpu.commit_smem()  # all four warps have done their products with the queries
    r.queries.at[warpgroup][...] = out.astype(r.queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(r.queries.at[warpgroup], r.out.at[rows, b.head])
    plgpu.wait_smem_to_gmem(0)


def _meet(b: Block) -> None:
    """The warpgroups take turns: one has issued its products, the other has done its softmax."""
    if b.g.tiles.ping_pong:
        plgpu.barrier_arrive(b.refs.turn)
        plgpu.barrier_wait(b.refs.turn)


def _issue_scores(b: Block, warpgroup: jax.Array, step: jax.Array, scores: Any) -> None:
    """Q K^T, [64, keys], without any scale."""
    r, slot = b.refs, b.slot(step)
    plgpu.barrier_wait(r.keys_ready.at[slot])
    plgpu.wgmma(scores, r.queries.at[warpgroup], r.keys.at[slot].transpose((1, 0)))
    plgpu.wgmma(scores, r.rope_queries.at[warpgroup], r.rope_keys.at[slot].transpose((1, 0)))


def _issue_values(b: Block, step: jax.Array, probs: Any, out: Any) -> None:
    """P V, [64, 128]."""
    r, slot = b.refs, b.slot(step)
    plgpu.barrier_wait(r.values_ready.at[slot])
    plgpu.wgmma(out, probs, r.values.at[slot])


def _first_scores(b: Block, warpgroup: jax.Array) -> jax.Array:
    first = jnp.int32(0)

    def multiply(scores: Any) -> jax.Array:
        _issue_scores(b, warpgroup, first, scores)
        _meet(b)
        return scores[...]

    scores = pl.run_scoped(multiply, accumulator(ROWS_EACH, b.g.tiles.keys))
    plgpu.barrier_arrive(b.refs.keys_free.at[b.slot(first)])
    return scores


def _multiply(
    b: Block, warpgroup: jax.Array, step: jax.Array, probs: Any, out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """O + P V of a step, and the scores of the next one: together, so that the tensor cores do not
    wait between them.
    """

    def multiply(scores: Any) -> tuple[jax.Array, jax.Array]:
        def both(sums: Any) -> None:
            _issue_values(b, step, probs, sums)
            _issue_scores(b, warpgroup, step + 1, scores)
            _meet(b)
            plgpu.wgmma_wait(0)

        (new_out,) = multiply_add([out], both, b.g.interpret is not None)
        return new_out, scores[...]

    out, scores = pl.run_scoped(multiply, accumulator(ROWS_EACH, b.g.tiles.keys))
    plgpu.barrier_arrive(b.refs.keys_free.at[b.slot(step + 1)])
    plgpu.barrier_arrive(b.refs.values_free.at[b.slot(step)])
    return out, scores


def _last_values(b: Block, warpgroup: jax.Array, probs: Any, out: jax.Array) -> jax.Array:
    last = b.count - 1

    def multiply(sums: Any) -> None:
        _issue_values(b, last, probs, sums)
        pl.when(warpgroup == 0)(lambda: _meet(b))
        plgpu.wgmma_wait(0)

    (out,) = multiply_add([out], multiply, b.g.interpret is not None)
    plgpu.barrier_arrive(b.refs.values_free.at[b.slot(last)])
    return out


def _mask(b: Block, scores: jax.Array, query: tuple[jax.Array, jax.Array], tile: Any) -> jax.Array:
    """Hides the keys of other sequences and later ones."""
    columns = pl.ds(tile * b.g.tiles.keys, b.g.tiles.keys)
    seq, pos = (
        lax.broadcast_in_dim(load(x.at[columns], COLUMNS), scores.shape, [1])
        for x in (b.refs.key_seq, b.refs.key_pos)
    )
    query_seq, query_pos = (by_row(x, scores) for x in query)
    return jnp.where((seq == query_seq) & (pos <= query_pos), scores, HIDDEN)


def _softmax(
    b: Block,
    warpgroup: jax.Array,
    scores: jax.Array,
    out: jax.Array,
    top: jax.Array,
    total: jax.Array,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """In base 2 and fp32.

    Args:
        b: the thread block.
        warpgroup: which one.
        scores: [64, keys].
        out: [64, 128], sums of values.
        top: [64], maximum so far, as an exponent of 2.
        total: [64], sum of probabilities so far.

    Returns:
        probabilities as the left operand of a product, [64, keys]; `out` in proportion to the new
        maximum; the new `top` and `total`.
    """
    factor = b.g.exponent
    new_top = jnp.maximum(top, scores.max(axis=1) * factor)
    alpha = jnp.exp2(top - new_top)
    probs = jnp.exp2(scores * factor - by_row(new_top, scores))
    out = out * by_row(alpha, out)
    total = total * alpha + probs.sum(axis=1)
    left: Any = probs.astype(b.refs.values.dtype)
    if b.g.interpret:
        b.refs.probs.at[warpgroup][...] = left
        plgpu.commit_smem()
        left = b.refs.probs.at[warpgroup]
    else:
        # Otherwise the compiler moves parts of this past the turn.
        out, total, new_top, left = lax.optimization_barrier((out, total, new_top, left))
    _meet(b)
    return left, out, new_top, total
