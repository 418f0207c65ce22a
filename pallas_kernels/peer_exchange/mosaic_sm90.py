"""`peer_exchange` for Hopper: tiles of rows go through shared memory into the peer's result.

Thread block (turn, shard) serves one peer: it copies every `shards`-th tile of the run for that
peer by TMA, first into its shared memory and from there into the peer's memory, with several tiles
on their way. When its last copy has ended it signals the thread block of the peer that serves this
rank and has the same shard, and waits for its signal: when all thread blocks of a launch have
ended, all rows have arrived. Only tiles that hold rows travel.

Why a fast peer does no harm. It can be ahead of this GPU by most of a step. But XLA puts a barrier
of all GPUs before every launch of a kernel with peers, in stream order, after the semaphores are
zeroed: a peer writes the result, and signals, only when this GPU has reached the same launch,
whose buffers are not in use before it. And a launch ends only when all its signals have come, one
for each thread block, so no signal is on its way to a semaphore that means something else by then.
Leaving out the barrier (`skip_device_barrier`) would need results and semaphores that persist over
launches; Pallas zeroes semaphores at each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, Shaped

from pallas_kernels.hopper import compiler_params
from pallas_kernels.peer_exchange.transport import OneDevice, Peers, Transport

THREAD_BLOCKS = 64
"""Of a launch, at most. They wait for those of peers, so all must fit on a GPU at once, beside what
other streams run: a kernel of NCCL, say, that a peer waits for. 64 have 7 MB on their way.
"""
SLOTS = 4
"""Tiles of a thread block on their way."""
TILE_BYTES = 32 * 1024
"""Of a tile, at most; a row if that is longer."""
IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
"""Makes of a copy a plain one of bytes; tiled ones have at most 256 elements a dimension."""
COPY_BYTES = 16
"""Copies begin and end at multiples of this."""


def peer_exchange(
    rows: Shaped[Array, "R C W"], counts: Int[Array, " R"], axis: str
) -> tuple[Shaped[Array, "R C W"], Int[Array, " R"]]:
    """See `api.peer_exchange`."""
    return _launch(rows, counts, Peers(ranks=rows.shape[0], axis=axis), interpret=None)


def loop_back(
    rows: Shaped[Array, "R R C W"],
    counts: Int[Array, "R R"],
    *,
    interpret: Any = None,
    thread_blocks: int = THREAD_BLOCKS,
    tile_bytes: int = TILE_BYTES,
) -> tuple[Shaped[Array, "R R C W"], Int[Array, "R R"]]:
    """The same kernel with all ranks in the memory of one device.

    Args:
        rows: leading axis: the rank that sends.
        counts: likewise.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.
        thread_blocks: of a rank, at most.
        tile_bytes: of a tile, at most.

    Returns:
        As `peer_exchange`; leading axis: the rank that receives.
    """
    return _launch(
        rows,
        counts,
        OneDevice(ranks=rows.shape[0]),
        interpret=interpret,
        thread_blocks=thread_blocks,
        tile_bytes=tile_bytes,
    )


def _launch(
    rows: jax.Array,
    counts: jax.Array,
    transport: Transport,
    *,
    interpret: Any,
    thread_blocks: int = THREAD_BLOCKS,
    tile_bytes: int = TILE_BYTES,
) -> tuple[jax.Array, jax.Array]:
    *lead, ranks, capacity, width = rows.shape
    padding = -width % (COPY_BYTES // rows.dtype.itemsize)
    padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
    at_once = _rows_at_once(capacity, padded.shape[-1] * rows.dtype.itemsize, tile_bytes)
    shards = max(1, min(thread_blocks // ranks, capacity // at_once))
    # A count travels as the least that a copy moves.
    told_type = (*lead, ranks, COPY_BYTES // 4)
    kernel = plgpu.kernel(
        functools.partial(_body, transport=transport, shards=shards),
        out_type=[
            jax.ShapeDtypeStruct(padded.shape, rows.dtype),
            jax.ShapeDtypeStruct(told_type, jnp.int32),
        ],
        scratch_types={
            "slots": plgpu.SMEM((SLOTS, at_once, padded.shape[-1]), rows.dtype),
            "note": plgpu.SMEM(told_type[-1:], jnp.int32),
            "loaded": plgpu.Barrier(num_barriers=SLOTS),
            "noted": plgpu.Barrier(),
        },
        grid=(*transport.grid.values(), ranks, shards),
        grid_names=(*transport.grid, "turn", "shard"),
        kernel_name="peer_exchange",
        compiler_params=compiler_params(auto_barriers=True),
        interpret=interpret,
    )
    out, told = kernel(padded, jnp.broadcast_to(counts[..., None], told_type))
    return out[..., :width], told[..., 0]


def _rows_at_once(capacity: int, row_bytes: int, tile_bytes: int) -> int:
    """Rows of a tile: as many as fit, and a divisor of a run, so that no tile leaves it."""
    most = max(1, min(capacity, tile_bytes // row_bytes))
    return next(n for n in range(most, 0, -1) if capacity % n == 0)


def _body(
    rows: Any,
    counts: Any,
    out: Any,
    told: Any,
    *,
    slots: Any,
    note: Any,
    loaded: Any,
    noted: Any,
    transport: Transport,
    shards: int,
) -> None:
    ranks, at_once = transport.ranks, slots.shape[1]
    me, shard = transport.me(), lax.axis_index("shard")
    # Every rank begins with another peer, the next one; last with itself.
    peer = lax.rem(me + 1 + lax.axis_index("turn"), jnp.int32(ranks))
    source, counts = transport.own(rows).at[peer], transport.own(counts)
    target = transport.remote(out, peer).at[me]
    tiles = pl.cdiv(counts[peer, 0], at_once)
    mine = pl.cdiv(jnp.maximum(tiles - shard, 0), shards)

    def tile(ref: Any, step: Any) -> Any:
        return ref.at[pl.ds((shard + step * shards) * at_once, at_once)]

    def load(step: Any) -> None:
        slot = lax.rem(step, jnp.int32(SLOTS))
        plgpu.copy_gmem_to_smem(
            tile(source, step), slots.at[slot], loaded.at[slot], oob_mode=IN_BOUNDS
        )

    for step in range(SLOTS):
        pl.when(step < mine)(functools.partial(load, jnp.int32(step)))

    @pl.when(shard == 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(counts.at[peer], note, noted, oob_mode=IN_BOUNDS)
        plgpu.barrier_wait(noted)
        plgpu.copy_smem_to_gmem(note, transport.remote(told, peer).at[me])

    @pl.loop(0, mine)
    def _(step: jax.Array) -> None:
        slot = lax.rem(step, jnp.int32(SLOTS))
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.copy_smem_to_gmem(slots.at[slot], tile(target, step))
        # The slot of the tile before this one is free once that copy has read it.
        following = step - 1 + SLOTS

        @pl.when((step > 0) & (following < mine))
        def _() -> None:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load(following)

    plgpu.wait_smem_to_gmem(0)
    transport.meet(peer, shard, shards)
