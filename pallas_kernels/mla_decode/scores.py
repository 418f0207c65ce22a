"""Warpgroup 0 of the Hopper kernels of `mla_decode`: scores and their softmax.

Softmax is in base 2; maxima and sums are fp32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, ROWS, by_row, row_values
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.work import FIRST, GROUP, PARTIAL, TILE, TILES, WHOLE

HIDDEN = -(2.0**100)
"""Score of what a query may not see. A power of two, so that its product with the scale is exact:
in a row that sees nothing all exponents are 0, not the rounding error of a huge number.
"""


LAG = 8.0
"""Exponents of 2 by which scores may exceed the maximum that probabilities are relative to. It
seldom moves then, and older results need not shrink (`shrink.py`). Probabilities are 256 at most,
and as exact as if they were 1 at most. FlashAttention-4 rescales as seldom.
"""


def run(b: Block) -> None:
    """Does a worker's items in turn."""
    b.set_registers(0)
    lax.fori_loop(b.first_item, b.end_item, functools.partial(_item, b), jnp.int32(0))
    for slot in range(b.prob_slots):
        plgpu.barrier_wait(b.refs.probs_free.at[slot])


def _item(b: Block, item: jax.Array, step: jax.Array) -> jax.Array:
    order = item - b.first_item
    group, first, tiles, whole, partial = (
        b.refs.items[item, column] for column in (GROUP, FIRST, TILES, WHOLE, PARTIAL)
    )
    limits = _limits(b, group)
    with jax.named_scope("queries"):
        queries, factor = b.take_queries(step, order)
    number = step - order  # of the first tile, counted without the steps that load queries

    def tile(index: jax.Array, carry: Any, masked: bool) -> Any:
        top, total, scores = carry
        if masked:
            scores = _mask(scores, limits, (first + index) * TILE)
        with jax.named_scope("softmax"):
            top, total = _softmax(b, number + index, top, total, scores, factor)
        with jax.named_scope("scores"):
            return top, total, b.scores(queries, step + 2 + index)

    lowest = row_values(HIDDEN) * factor
    with jax.named_scope("scores"):
        carry = lowest, row_values(0.0), b.scores(queries, step + 1)
    whole = jnp.minimum(whole, tiles - 1)
    carry = lax.fori_loop(0, whole, functools.partial(tile, masked=False), carry)
    carry = lax.fori_loop(whole, tiles - 1, functools.partial(tile, masked=True), carry)
    top, total, scores = carry
    scores = _mask(scores, limits, (first + tiles - 1) * TILE)
    with jax.named_scope("softmax"):
        top, total = _softmax(b, number + tiles - 1, top, total, scores, factor)

    # A row without a limit took part in tiles that all others see whole.
    seen = (top > lowest / 2) & (limits > 0)
    _publish_norm(b, order, jnp.where(seen, b.value_factor / total, 0.0))
    lse = jnp.where(seen, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
    _store_lse(b, group, partial, lse)
    return step + 1 + tiles


def _limits(b: Block, group: jax.Array) -> jax.Array:
    """Cached rows that each query row sees: one number for all rows, or [64]."""
    g, visible = b.g, b.refs.visible
    if g.heads >= TILE:
        return visible[group * g.queries + lax.div(b.part * TILE, g.heads)]
    first, last = group * g.queries + b.part * g.part_tokens, visible.shape[0] - 1
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS)
    limits = plgpu.layout_cast(jnp.full((TILE,), visible[first], jnp.int32), ROWS)
    for token in range(1, g.part_tokens):
        # Rows past the group's last token belong to the next group, if any; nobody keeps them.
        limit = visible[jnp.minimum(first + token, last)]
        limits = jnp.where(row < token * g.heads, limits, limit)
    return limits


def _mask(scores: jax.Array, limits: jax.Array, first: jax.Array) -> jax.Array:
    """Hides the columns, cached rows `first` and later, that a query row may not see."""
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX) + first
    if limits.shape:
        limits = by_row(limits, scores)
    return jnp.where(column < limits, scores, HIDDEN)


def _softmax(
    b: Block, number: jax.Array, top: jax.Array, total: jax.Array, scores: jax.Array, factor: Any
) -> tuple[jax.Array, jax.Array]:
    """Publishes the probabilities of a tile, and before them the factor alpha by which older
    results shrink: applying it takes the other warpgroups a while.

    Args:
        b: the thread block.
        number: of the tile, through all items.
        top: maximum of each row so far, as an exponent of 2.
        total: sum of each row so far.
        scores: [64, 64].
        factor: from scores to exponents of 2, see `Block.take_queries`.

    Returns:
        The new `top` and `total`.
    """
    r, slot, place = b.refs, lax.rem(number, b.prob_slots), lax.rem(number, b.prob_slots + 1)
    largest = scores.max(axis=1) * factor
    new_top = jnp.where(largest > top + LAG, largest, top)
    alpha = jnp.exp2(top - new_top)
    r.factors.at[place][...] = alpha
    plgpu.barrier_arrive(b.signal("alpha", place))
    factor = factor if isinstance(factor, float) else by_row(factor, scores)
    probs = jnp.exp2(scores * factor - by_row(new_top, scores))
    plgpu.barrier_wait(r.probs_free.at[slot])
    r.probs.at[slot][...] = probs.astype(r.probs.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(b.signal("probs", slot))
    return new_top, total * alpha + probs.sum(axis=1)


def _publish_norm(b: Block, order: jax.Array, norm: jax.Array) -> None:
    place = lax.rem(order, b.prob_slots + 1)
    b.refs.factors.at[b.prob_slots + 1 + place][...] = norm
    plgpu.barrier_arrive(b.signal("norm", place))


def _store_lse(b: Block, group: jax.Array, partial: jax.Array, lse: jax.Array) -> None:
    @pl.when(partial < 0)
    def _() -> None:
        b.refs.lse.at[group, b.part][...] = lse

    @pl.when(partial >= 0)
    def _() -> None:
        b.refs.lse_parts.at[partial, b.part][...] = lse
