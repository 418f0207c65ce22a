"""Warpgroups 1 and 2 of the Hopper kernels of `mla_decode`: products with the values, and loads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, ROWS, by_row, multiply_add
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.work import FIRST, GROUP, PARTIAL, SEEN, TILE, TILES


def run(b: Block, half: int) -> None:
    """Does a worker's items in turn, for one half of the latent columns."""
    plgpu.set_max_registers(b.g.tiles.registers[1], action="decrease")
    plgpu.barrier_arrive(b.refs.probs_free)  # as if probabilities before had been read
    carry = b.begin(half)
    if half == 0:
        b.copy_rope(b.load(0), jnp.int32(0))
        b.next_rope(b.load(1), jnp.int32(1))
    item = functools.partial(_item, b, half)
    lax.fori_loop(b.first_item, b.end_item, item, (jnp.int32(0), carry))
    plgpu.wait_smem_to_gmem(0)


def _item(b: Block, half: int, item: jax.Array, state: Any) -> Any:
    (step, carry), order = state, item - b.first_item
    group, first, tiles, seen, partial = (
        b.refs.items[item, column] for column in (GROUP, FIRST, TILES, SEEN, PARTIAL)
    )
    rope_load, carry = carry[0], b.refill(half, step, carry)
    plgpu.barrier_wait(b.signal("queries taken", lax.rem(order, 2)))
    if half == 0:
        b.next_rope(rope_load, step + 2)

    def tile(index: jax.Array, state: Any) -> Any:
        (out, carry), now = state, step + 1 + index
        rope_load, carry = carry[0], b.refill(half, now, carry)
        out = _shrink(b, lax.rem(step - order + index, 2), out)
        plgpu.barrier_wait(b.signal("probs"))  # and so the scores of this tile are done
        _clear_hidden(b, half, now, seen - (first + index) * TILE)
        return _add(b, half, now, rope_load, out), carry

    columns = min(b.g.tiles.value_columns, b.g.half)
    zero = plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), MATRIX)
    state = [zero] * (b.g.half // columns), carry
    out, carry = lax.fori_loop(0, tiles, tile, state)
    even = lax.rem(order, 2)
    plgpu.barrier_wait(b.signal("norm", even))
    norm = plgpu.load(b.refs.factors.at[2 + even], layout=ROWS)
    out = [o * by_row(norm, o) for o in out]
    _store(b, half, step + tiles, group, partial, out)
    return step + 1 + tiles, carry


def _shrink(b: Block, even: jax.Array, out: list[jax.Array]) -> list[jax.Array]:
    """alpha O."""
    plgpu.barrier_wait(b.signal("alpha", even))
    alpha = plgpu.load(b.refs.factors.at[even], layout=ROWS)
    return [o * by_row(alpha, o) for o in out]


def _clear_hidden(b: Block, half: int, step: jax.Array, rows: jax.Array) -> None:
    """Zeros the rows of a tile from `rows` on: their probabilities are 0, but 0 * NaN is NaN."""
    ring, slot = b.refs.tiles[half], lax.rem(step, b.slots)

    @pl.when(rows < TILE)
    def _() -> None:
        for start in range(0, b.g.half, 64):
            strip = ring.at[slot, :, pl.ds(start, 64)]
            row = plgpu.broadcasted_iota(jnp.int32, (TILE, 64), 0, layout=MATRIX)
            values = plgpu.load(strip, layout=MATRIX)
            strip[...] = jnp.where(row < rows, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _add(
    b: Block, half: int, step: jax.Array, rope_load: jax.Array, out: list[jax.Array]
) -> list[jax.Array]:
    """O + P V with the tile of a step; meanwhile the rope tile of step + 2 is asked for."""
    r, slot, columns = b.refs, lax.rem(step, b.slots), out[0].shape[1]

    def multiply(*sums: Any) -> None:
        for i, ref in enumerate(sums):
            values = r.tiles[half].at[slot, :, pl.ds(i * columns, columns)]
            plgpu.wgmma(ref, r.probs, values)
        if half == 0:
            b.next_rope(rope_load, step + 2)
        plgpu.wgmma_wait(0)

    out = multiply_add(out, multiply, b.g.interpret is not None)
    plgpu.barrier_arrive(r.probs_free)
    return out


def _store(
    b: Block,
    half: int,
    step: jax.Array,
    group: jax.Array,
    partial: jax.Array,
    out: list[jax.Array],
) -> None:
    """Writes this half of the results: partial ones directly, final ones through the slot of the
    item's last step.
    """
    r, g, columns = b.refs, b.g, out[0].shape[1]

    @pl.when(partial >= 0)
    def _() -> None:
        for i, part in enumerate(out):
            where = pl.ds(half * g.half + i * columns, columns)
            r.out_parts.at[partial, b.part, :, where][...] = part

    @pl.when(partial < 0)
    def _() -> None:
        plgpu.commit_smem()  # all four warps have done their products with the slot
        staged = b.staging(half).at[lax.rem(step, b.slots)]
        for i, part in enumerate(out):
            staged.at[:, pl.ds(i * columns, columns)][...] = part.astype(r.out.dtype)
        plgpu.commit_smem()
        g.store(staged, r.out.at[:, pl.ds(half * g.half, g.half)], group, b.part)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
