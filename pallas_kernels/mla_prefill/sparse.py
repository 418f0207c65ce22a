"""Block lists for sparse attention over one long prompt, estimated from its queries and keys.

The patterns of MInference 1.0 (Jiang et al. 2024, section 3), which are chosen for each head
beforehand, with tiles of keys where it has single columns and diagonals. All of them keep the tiles
that hold a query's own position, so every query sees a key, and none keeps tiles that a plan hides.
With budgets as large as the prompt they keep all the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.work import Pairs, TiledRows, pairs_of
from pallas_kernels.softmax import masked_softmax

HEADS_AT_ONCE = 8
"""Whose probabilities exist at one time."""


def a_shape(plan: MlaPrefillPlan, *, sink: int, local: int, key_tile: int = 128) -> BlockList:
    """The first keys of a sequence and the last ones before a query; the same for all heads.

    Args:
        plan: who sees what.
        sink: positions from 0 on.
        local: positions up to the query's own.
        key_tile: keys of a tile, 64 or 128.
    """
    pairs = pairs_of(plan, key_tile)
    chosen = pairs.seen & ((pairs.key.first_pos < sink) | _near(pairs, local))
    return BlockList.of(chosen[None], key_tile)


def vertical_slash(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    plan: MlaPrefillPlan,
    *,
    scale: float,
    verticals: int,
    slashes: int,
    last: int = 64,
    key_tile: int = 128,
) -> BlockList:
    """The tiles of keys that all queries visit, and the distances at which they visit tiles, that
    get most of the attention of the last queries.

    Args:
        q_nope: as for `mla_prefill`.
        q_rope: likewise.
        k_nope: likewise; keys stand by rising position, tiles of other orders are kept too often.
        k_rope: likewise.
        plan: who sees what: one sequence. Tiles of other sequences than the last query's are kept.
        scale: softmax scale.
        verticals: tiles of keys of each head.
        slashes: distances of each head, in steps of a tile.
        last: queries that speak for all.
        key_tile: keys of a tile, 64 or 128.
    """
    pairs = pairs_of(plan, key_tile)
    query, key, keys = pairs.query, pairs.key, pairs.key.seq.size
    used = plan.query_seq >= 0
    end = jnp.max(jnp.where(used, jnp.arange(used.size), -1)) + 1
    size = min(last, used.size)
    q_nope, q_rope, seq, pos = (
        jax.lax.dynamic_slice_in_dim(x, jnp.maximum(end - size, 0), size)
        for x in (q_nope, q_rope, plan.query_seq, plan.query_pos)
    )
    sequence = plan.query_seq[jnp.maximum(end - 1, 0)]
    mine = (seq == sequence)[:, None] & (plan.key_seq == sequence) & (sequence >= 0)
    mask = mine & (plan.key_pos <= pos[:, None])
    spare = keys - plan.key_seq.shape[0]

    def estimate(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        nope, rope, k = head
        scores = _product(nope, k) + _product(rope, k_rope)
        probs = masked_softmax(scores * scale, mask)[0]
        by_tile = jnp.pad(probs, ((0, 0), (0, spare))).reshape(size, -1, key_tile).sum(axis=2)
        at = _distance(pos[:, None], key, key_tile)
        slash = jax.ops.segment_sum(by_tile.reshape(-1), at.reshape(-1), key.whole.size)
        return by_tile.sum(axis=0), slash

    heads = (q_nope.swapaxes(0, 1), q_rope.swapaxes(0, 1), k_nope.swapaxes(0, 1))
    vertical_hb, slash_hd = jax.lax.map(estimate, heads, batch_size=HEADS_AT_ONCE)
    vertical, slash = _top(vertical_hb, verticals), _top(slash_hd, slashes)

    # Whether a chosen distance is between those of the first and of the last query of a tile.
    up_to = jnp.cumsum(slash, axis=1)
    nearest, farthest = (
        _distance(x[:, None], key, key_tile) for x in (query.first_pos, query.last_pos)
    )
    before = jnp.where(nearest > 0, up_to[:, nearest - 1], 0)
    chosen = vertical[:, None, :] | (up_to[:, farthest] > before)
    other = (key.first_seq != sequence) | (key.last_seq != sequence)
    chosen = pairs.seen & (chosen | _near(pairs, 1) | other)
    return BlockList.of(chosen, key_tile)


def block_sparse(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    plan: MlaPrefillPlan,
    *,
    top: int,
    key_tile: int = 128,
) -> BlockList:
    """The tiles of keys whose mean has the largest products with the mean of a tile of queries.

    Args:
        q_nope: as for `mla_prefill`.
        q_rope: likewise.
        k_nope: likewise.
        k_rope: likewise.
        plan: who sees what.
        top: tiles of keys that a tile of queries of a head keeps at most, besides those that hold
            its own positions.
        key_tile: keys of a tile, 64 or 128.
    """
    pairs = pairs_of(plan, key_tile)
    q = _mean(q_nope, pairs.query), _mean(q_rope, pairs.query)
    scores = jnp.einsum("ahn,bhn->hab", q[0], _mean(k_nope, pairs.key), precision="highest")
    scores += jnp.einsum("ahp,bp->hab", q[1], _mean(k_rope, pairs.key), precision="highest")
    near = _near(pairs, 1)
    best = _top(jnp.where(pairs.seen & ~near, scores, -jnp.inf), top)
    return BlockList.of(pairs.seen & (best | near), key_tile)


def _near(pairs: Pairs, local: int) -> jax.Array:
    """bool [A, B]: the key tile may hold one of the last `local` keys of a query of the tile."""
    return pairs.key.last_pos > pairs.query.first_pos[:, None] - local


def _distance(pos: jax.Array, key: TiledRows, key_tile: int) -> jax.Array:
    """Tiles between a position and the first key of each tile."""
    return jnp.clip((pos - key.first_pos) // key_tile, 0, key.whole.size - 1)


def _product(q: Float[Array, "Q N"], k: Float[Array, "S N"]) -> jax.Array:
    return jnp.einsum("qn,sn->qs", q, k, preferred_element_type=jnp.float32)


def _top(scores: Float[Array, "*R N"], count: int) -> jax.Array:
    """bool, the `count` largest of the last axis."""
    count = min(count, scores.shape[-1])
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return rank < count


def _mean(x: Float[Array, "N *H"], tiled: TiledRows) -> jax.Array:
    """Mean of the rows of each tile that belong to a sequence, fp32."""
    tiles, size = tiled.seq.shape
    used = (tiled.seq >= 0).reshape(-1, *[1] * (x.ndim - 1))
    x = jnp.pad(x.astype(jnp.float32), ((0, tiles * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    total = jnp.where(used, x, 0).reshape(tiles, size, *x.shape[1:]).sum(axis=1)
    return total / jnp.maximum(used.reshape(tiles, size, *used.shape[1:]).sum(axis=1), 1)
