"""Warpgroups 1 and 2 of the Hopper kernels of `mla_decode`: products with the values, and loads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, ROWS, by_row
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.shrink import scale_rows
from pallas_kernels.mla_decode.work import FIRST, GROUP, PARTIAL, SEEN, TILE, TILES


def run(b: Block, half: int) -> None:
    """Does a worker's items in turn, for one half of the latent columns."""
    b.set_registers(1)
    for slot in range(b.prob_slots):  # as if probabilities before had been read
        plgpu.barrier_arrive(b.refs.probs_free.at[slot])
    item = functools.partial(_item, b, half)
    lax.fori_loop(b.first_item, b.end_item, item, (jnp.int32(0), b.begin(half)))
    plgpu.wait_smem_to_gmem(0)


def _item(b: Block, half: int, item: jax.Array, state: Any) -> Any:
    (step, carry), order = state, item - b.first_item
    group, first, tiles, seen, partial = (
        b.refs.items[item, column] for column in (GROUP, FIRST, TILES, SEEN, PARTIAL)
    )
    with jax.named_scope("queries"):
        carry = b.begin_item(half, step, order, carry)

    def tile(index: jax.Array, state: Any) -> Any:
        (out, carry), now, number = state, step + 1 + index, step - order + index
        carry = b.before_product(half, now, carry)
        with jax.named_scope("shrink"):
            out = _shrink(b, lax.rem(number, b.prob_slots + 1), out)
        slot = lax.rem(number, b.prob_slots)
        with jax.named_scope("wait"):
            plgpu.barrier_wait(b.signal("probs", slot))  # and so the scores of this tile are done
        _clear_hidden(b, half, now, seen - (first + index) * TILE)
        with jax.named_scope("products"):
            out, carry = b.add(half, now, b.refs.probs.at[slot], carry, out)
        plgpu.barrier_arrive(b.refs.probs_free.at[slot])
        return out, carry

    zero = [
        plgpu.layout_cast(jnp.zeros(part.shape, jnp.float32), MATRIX)
        for part in b.values(half, step)
    ]
    out, carry = lax.fori_loop(0, tiles, tile, (zero, carry))
    with jax.named_scope("results"):
        place = lax.rem(order, b.prob_slots + 1)
        plgpu.barrier_wait(b.signal("norm", place))
        norm = plgpu.load(b.refs.factors.at[b.prob_slots + 1 + place], layout=ROWS)
        out = [b.normed(o, by_row(norm, o)) for o in out]
        _store(b, half, step + tiles, group, partial, out)
    return step + 1 + tiles, carry


def _shrink(b: Block, place: jax.Array, out: list[jax.Array]) -> list[jax.Array]:
    """alpha O."""
    plgpu.barrier_wait(b.signal("alpha", place))
    alpha = plgpu.load(b.refs.factors.at[place], layout=ROWS)
    return scale_rows(alpha, out, b.g.interpret)


def _clear_hidden(b: Block, half: int, step: jax.Array, rows: jax.Array) -> None:
    """Zeros the rows of a tile from `rows` on: their probabilities are 0, but 0 * NaN is NaN."""

    @pl.when(rows < TILE)
    def _() -> None:
        for part in b.values(half, step):
            for start in range(0, part.shape[1], 64):
                strip = part.at[:, pl.ds(start, 64)]
                row = plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=MATRIX)
                values = plgpu.load(strip, layout=MATRIX)
                strip[...] = jnp.where(row < rows, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _store(
    b: Block,
    half: int,
    step: jax.Array,
    group: jax.Array,
    partial: jax.Array,
    out: list[jax.Array],
) -> None:
    """Writes this half of the results: partial ones directly, final ones through shared memory."""
    r, g, columns = b.refs, b.g, out[0].shape[1]

    @pl.when(partial >= 0)
    def _() -> None:
        for i, part in enumerate(out):
            where = pl.ds(half * g.half + i * columns, columns)
            r.out_parts.at[partial, b.part, :, where][...] = part

    @pl.when(partial < 0)
    def _() -> None:
        plgpu.commit_smem()  # all four warps have done their products with the tile
        staged = b.results(half, step)
        width = g.half // len(staged)
        for i, part in enumerate(out):
            place, at = divmod(i * columns, width)
            staged[place].at[:, pl.ds(at, columns)][...] = part.astype(r.out.dtype)
        plgpu.commit_smem()
        for i, tile in enumerate(staged):
            g.store(tile, r.out.at[:, pl.ds(half * g.half + i * width, width)], group, b.part)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
