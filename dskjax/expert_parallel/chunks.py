"""A layer's rows in chunks, so that what it needs beside its result does not grow with them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.xla import blocks_of

MOE_CHUNK_TOKENS = 8192
"""Rows at once where nobody says otherwise. In DeepSeek-V3 they bring 65,536 pairs of row and
expert, at 7168 bf16 channels 0.9 GB each time they are copied.
"""


def in_chunks(
    run: Callable[..., jax.Array], rows: tuple[jax.Array, ...], most: int | None
) -> jax.Array:
    """`run(*rows)` for a `run` that works row by row, over at most `most` rows at a time.

    Chunks have one size and lie within the rows: the last one begins early and does a few rows of
    the one before it again, which gives the same, so nothing is padded or copied.

    Args:
        run: takes arrays [T, ...], returns [T, ...] like the first of them; may hold collectives,
            if all ranks have as many rows.
        rows: arrays [T, ...].
        most: rows at once; None: all.
    """
    total = rows[0].shape[0]
    if most is None or total <= most:
        return run(*rows)
    count = -(-total // most)
    size = -(-total // count)

    def step(n: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(n * size, total - size)
        part = run(*(lax.dynamic_slice_in_dim(x, start, size) for x in rows))
        return lax.dynamic_update_slice_in_dim(out, part, start, 0)

    return lax.fori_loop(0, count, step, jnp.zeros_like(rows[0]))


def workspace_bytes(
    *,
    rows: int,
    ranks: int,
    experts: int,
    hidden_size: int,
    width: int,
    top_k: int,
    itemsize: int,
) -> int:
    """Memory of one chunk on a device, beside rows, weights and result, with `impl="xla"`.

        pairs    P = ranks * rows * top_k: every choice of every row, as if all went to this device
        padded   Q = blocks * block: P in blocks of rows of one expert, each with its weights' copy
        products max(Q (D + 2 F') + blocks 2 F D, Q (F + D') + blocks F D), for D `hidden_size`, F
                 `width`, in elements; where they are not of 4 bytes, sums F' and D' count 4 more
        beside   P (F + D): hidden rows, and rows on their way back; 32 bytes of indices a pair
        travel   3 ranks * rows * D, if ranks > 1: rows as sent, as received and as the experts' own

    It holds for any load: a step whose experts get what a balanced load brings takes less, and so
    do kernels that read weights in place.

    Args:
        rows: of a rank in a chunk, at most `Exchange.moe_chunk_tokens`.
        ranks: between which rows travel; 1 where they do not ("sum" and "local").
        experts: of a device.
        hidden_size: channels of a row.
        width: intermediate size of an expert on a device.
        top_k: choices of a row.
        itemsize: bytes of an element of rows and of weights as they are multiplied.
    """
    received = ranks * rows
    pairs = received * top_k
    block, blocks = blocks_of(pairs, experts)
    padded, total = block * blocks, itemsize if itemsize == 4 else itemsize + 4
    up = padded * (hidden_size * itemsize + 2 * width * total)
    down = padded * (width * itemsize + hidden_size * total)
    copies = blocks * width * hidden_size * itemsize
    beside = pairs * ((width + hidden_size) * itemsize + 32)
    travel = 3 * received * hidden_size * itemsize if ranks > 1 else 0
    return max(up + 2 * copies, down + copies) + beside + travel
