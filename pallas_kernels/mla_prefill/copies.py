"""The warpgroup of the Hopper kernel of `mla_prefill` that copies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, ROWS, by_row
from pallas_kernels.mla_prefill.block import COMPUTE, REGISTERS, ROWS_EACH, VALUE, Block, load
from pallas_kernels.mla_prefill.tiles import QUERY_TILE


def run(b: Block) -> None:
    """Copies the queries, then keys and values step by step into slots that are free."""
    plgpu.set_max_registers(REGISTERS[1], action="decrease")
    r, slots = b.refs, b.g.tiles.slots
    for warpgroup in range(COMPUTE):
        first = b.tile * QUERY_TILE + warpgroup * ROWS_EACH
        rows, ready = pl.ds(first, ROWS_EACH), r.queries_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(r.q_nope.at[rows, b.head], r.queries.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(r.q_rope.at[rows, b.head], r.rope_queries.at[warpgroup], ready)

    def step(index: jax.Array, _: None) -> None:
        slot, tile = b.slot(index), b.key_tile(index)
        rows = pl.ds(tile * b.g.tiles.keys, b.g.tiles.keys)
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(r.keys_free.at[slot]))
        ready = r.keys_ready.at[slot]
        plgpu.copy_gmem_to_smem(r.k_nope.at[rows, b.head], r.keys.at[slot], ready)
        plgpu.copy_gmem_to_smem(r.k_rope.at[rows], r.rope_keys.at[slot], ready)
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(r.values_free.at[slot]))
        _copy_values(b, slot, tile, r.v.at[rows, b.head])

    lax.fori_loop(0, b.count, step, None)

    def drain(index: jax.Array, _: None) -> None:
        plgpu.barrier_wait(r.keys_free.at[b.slot(index)])
        plgpu.barrier_wait(r.values_free.at[b.slot(index)])

    lax.fori_loop(jnp.maximum(b.count - slots, 0), b.count, drain, None)


def _copy_values(b: Block, slot: jax.Array, tile: jax.Array, source: Any) -> None:
    """Zeros the rows that nobody sees: their probabilities are 0, but 0 * NaN is NaN."""
    r, unused = b.refs, b.refs.unused[tile]
    values, ready = r.values.at[slot], r.values_ready.at[slot]
    pl.when(unused == 0)(lambda: plgpu.copy_gmem_to_smem(source, values, ready))

    @pl.when(unused != 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(source, values, r.values_copied)
        plgpu.barrier_wait(r.values_copied)
        _clear_unused(b, values, tile * b.g.tiles.keys)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ready)


def _clear_unused(b: Block, values: Any, first: jax.Array) -> None:
    for row in range(0, b.g.tiles.keys, 64):
        seq = load(b.refs.key_seq.at[pl.ds(first + row, 64)], ROWS)
        for column in range(0, VALUE, 64):
            part = values.at[pl.ds(row, 64), pl.ds(column, 64)]
            old = plgpu.load(part, layout=MATRIX)
            part[...] = jnp.where(by_row(seq, old) >= 0, old, jnp.zeros_like(old))
