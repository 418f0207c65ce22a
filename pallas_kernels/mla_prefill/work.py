"""Which tiles of keys each tile of queries visits: the list of work of the Hopper kernel, and those
of the kernels of its gradients.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import QUERY_TILE

FULL, ALL = range(2)
"""Columns of `Work.counts` and `Walk.counts`."""
_SKIP, _MASKED, _FULL = range(3)
_NO_QUERY, _NO_KEY = -1, -2  # they differ, so that padding never sees unused keys
_LARGEST = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Work:
    """Tiles of 128 queries and of `key_tile` keys over the flat axes; the last ones may reach past
    the end.

    Attributes:
        query_seq: i32 [A * 128], -1 for padding.
        query_pos: i32 [A * 128].
        key_seq: i32 [B * key_tile], -2 for keys nobody sees.
        key_pos: i32 [B * key_tile].
        tiles: i32 [H or 1, A, most], for each query tile the key tiles it visits, those first that
            all its queries see whole.
        counts: i32 [H or 1, A, 2], how many are seen whole, and how many are visited: one at least,
            that nobody need see.
        unused: i32 [B], 1 where a tile holds a key nobody sees, whose value may be NaN.
    """

    query_seq: jax.Array
    query_pos: jax.Array
    key_seq: jax.Array
    key_pos: jax.Array
    tiles: jax.Array
    counts: jax.Array
    unused: jax.Array


def list_work(plan: MlaPrefillPlan, key_tile: int, blocks: BlockList | None = None) -> Work:
    """The pairs of tiles in which something can be seen, of all or of those of a block list."""
    pairs = pairs_of(plan, key_tile)
    state = jnp.where(pairs.full, _FULL, jnp.where(pairs.seen, _MASKED, _SKIP))[None]
    if blocks is None:
        tiles = jnp.broadcast_to(jnp.arange(state.shape[2]), state.shape)
    else:
        tiles = jnp.clip(blocks.tiles, 0, state.shape[2] - 1)
        listed = jnp.arange(tiles.shape[2]) < blocks.counts[:, :, None]
        state = jnp.where(listed, jnp.take_along_axis(state, tiles, axis=2), _SKIP)
    order = jnp.argsort(-state, axis=2, stable=True)
    whole, seen = ((state >= least).sum(axis=2) for least in (_FULL, _MASKED))
    counts = jnp.stack([whole, jnp.maximum(seen, 1)], axis=-1)
    query, key = pairs.query, pairs.key
    return Work(
        query_seq=query.seq.reshape(-1),
        query_pos=query.pos.reshape(-1),
        key_seq=key.seq.reshape(-1),
        key_pos=key.pos.reshape(-1),
        tiles=jnp.take_along_axis(tiles, order, axis=2).astype(jnp.int32),
        counts=counts.astype(jnp.int32),
        unused=1 - key.whole.astype(jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Walk:
    """For each of A tiles of one side, queries or keys, the tiles of the other that it meets.

    Attributes:
        query_seq: i32, of whole tiles, -1 for padding.
        query_pos: likewise.
        key_seq: i32, of whole tiles, -2 for keys nobody sees.
        key_pos: likewise.
        tiles: i32 [A, B], those first that are seen whole.
        counts: i32 [A, 2], how many are seen whole, and how many are met.
    """

    query_seq: jax.Array
    query_pos: jax.Array
    key_seq: jax.Array
    key_pos: jax.Array
    tiles: jax.Array
    counts: jax.Array


def walk_keys(plan: MlaPrefillPlan, query_tile: int, key_tile: int) -> Walk:
    """For each tile of queries its tiles of keys."""
    pairs = pairs_of(plan, key_tile, query_tile)
    return _walk(pairs, pairs.seen, pairs.full)


def walk_queries(plan: MlaPrefillPlan, query_tile: int, key_tile: int) -> Walk:
    """For each tile of keys its tiles of queries."""
    pairs = pairs_of(plan, key_tile, query_tile)
    return _walk(pairs, pairs.seen.T, pairs.full.T)


def _walk(pairs: "Pairs", seen: jax.Array, full: jax.Array) -> Walk:
    state = jnp.where(full, _FULL, jnp.where(seen, _MASKED, _SKIP))
    counts = [(state >= least).sum(axis=1) for least in (_FULL, _MASKED)]
    return Walk(
        query_seq=pairs.query.seq.reshape(-1),
        query_pos=pairs.query.pos.reshape(-1),
        key_seq=pairs.key.seq.reshape(-1),
        key_pos=pairs.key.pos.reshape(-1),
        tiles=jnp.argsort(-state, axis=1, stable=True).astype(jnp.int32),
        counts=jnp.stack(counts, axis=1).astype(jnp.int32),
    )


class TiledRows(typing.NamedTuple):
    """Queries or keys by tiles. The ranges are of those that belong to a sequence; a tile without
    any meets no other.

    Attributes:
        seq: i32 [tiles, tile].
        pos: i32 [tiles, tile].
        first_seq: i32 [tiles].
        last_seq: i32 [tiles].
        first_pos: i32 [tiles].
        last_pos: i32 [tiles].
        end_of_first: i32 [tiles], last position of the first sequence.
        end_of_last: i32 [tiles], of the last one.
        whole: bool [tiles], all rows belong to a sequence.
    """

    seq: jax.Array
    pos: jax.Array
    first_seq: jax.Array
    last_seq: jax.Array
    first_pos: jax.Array
    last_pos: jax.Array
    end_of_first: jax.Array
    end_of_last: jax.Array
    whole: jax.Array

    @classmethod
    def of(
        cls, seq: Int[Array, " N"], pos: Int[Array, " N"], tile: int, nobody: int
    ) -> "TiledRows":
        """`nobody` is the sequence of rows that have none."""
        spare = (0, -seq.shape[0] % tile)
        seq = jnp.pad(jnp.where(seq < 0, nobody, seq), spare, constant_values=nobody)
        rows = [x.astype(jnp.int32).reshape(-1, tile) for x in (seq, jnp.pad(pos, spare))]
        used = rows[0] >= 0
        lowest = [jnp.where(used, x, _LARGEST).min(axis=1) for x in rows]
        highest = [jnp.where(used, x, -1).max(axis=1) for x in rows]
        ends = [
            jnp.where(rows[0] == of[:, None], rows[1], -1).max(axis=1)
            for of in (lowest[0], highest[0])
        ]
        return cls(
            seq=rows[0],
            pos=rows[1],
            first_seq=lowest[0],
            last_seq=highest[0],
            first_pos=lowest[1],
            last_pos=highest[1],
            end_of_first=ends[0],
            end_of_last=ends[1],
            whole=used.all(axis=1),
        )


class Pairs(typing.NamedTuple):
    """All pairs of a tile of queries and one of keys.

    Attributes:
        query: tiles of queries.
        key: tiles of keys.
        seen: bool [A, B], False only where nothing can be seen.
        full: bool [A, B], True only where all can: both tiles are of one sequence, and no key is
            later than any query.
    """

    query: TiledRows
    key: TiledRows
    seen: jax.Array
    full: jax.Array


def pairs_of(plan: MlaPrefillPlan, key_tile: int, query_tile: int = QUERY_TILE) -> Pairs:
    """Compares the ranges of sequences and positions."""
    query = TiledRows.of(plan.query_seq, plan.query_pos, query_tile, _NO_QUERY)
    key = TiledRows.of(plan.key_seq, plan.key_pos, key_tile, _NO_KEY)
    q = jax.tree.map(lambda x: x[:, None], query)
    met = (q.first_seq <= key.last_seq) & (key.first_seq <= q.last_seq)
    same = (q.first_seq == key.last_seq) & (key.first_seq == q.last_seq)
    # Where one sequence ends and the next begins, its queries are far ahead of the next one's.
    one = key.first_seq == key.last_seq
    latest = jnp.where(one & (key.first_seq == q.first_seq), q.end_of_first, q.last_pos)
    latest = jnp.where(one & (key.first_seq == q.last_seq), q.end_of_last, latest)
    return Pairs(
        query=query,
        key=key,
        seen=met & (key.first_pos <= latest),
        full=same & q.whole & key.whole & (key.last_pos <= q.first_pos),
    )
