"""Block-sparse attention: which tiles of keys a tile of queries of a head visits."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import QUERY_TILE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class BlockList:
    """Tiles are of 128 queries and of `key_tile` keys, over the flat axes as they are.

    A query sees those keys of its plan that are in a tile of its list, no others.

    Attributes:
        tiles: i32 [H or 1, A, most], for each of A query tiles the key tiles it visits, in any
            order, none twice; entries from its count on may be anything.
        counts: i32 [H or 1, A].
        key_tile: keys of a tile, 64 or 128.
    """

    tiles: jax.Array
    counts: jax.Array
    key_tile: int = dataclasses.field(default=128, metadata={"static": True})

    @classmethod
    def of(cls, chosen: Bool[Array, "H A B"], key_tile: int) -> "BlockList":
        """From all pairs of tiles."""
        tiles = jnp.argsort(~chosen, axis=2, stable=True).astype(jnp.int32)
        return cls(tiles, chosen.sum(axis=2, dtype=jnp.int32), key_tile)

    def chosen(self, key_tiles: int) -> jax.Array:
        """bool [H or 1, A, key_tiles]."""
        heads, query_tiles, most = self.tiles.shape
        listed = jnp.arange(most) < self.counts[:, :, None]
        tiles = jnp.where(listed, self.tiles, key_tiles)  # past the end: dropped
        head, query = jnp.indices((heads, query_tiles), sparse=True)
        none = jnp.zeros((heads, query_tiles, key_tiles), bool)
        return none.at[head[:, :, None], query[:, :, None], tiles].set(True, mode="drop")


def visible(plan: MlaPrefillPlan, blocks: BlockList | None) -> jax.Array:
    """bool [rows, H or 1, T / rows, S / rows]: what the plan and the list let a query see."""
    seen = plan.mask()[:, None]
    if blocks is None:
        return seen
    rows, queries, keys = plan.rows, plan.query_seq.shape[0], plan.key_seq.shape[0]
    chosen = blocks.chosen(-(-keys // blocks.key_tile))
    chosen = chosen.repeat(QUERY_TILE, axis=1)[:, :queries]
    chosen = chosen.repeat(blocks.key_tile, axis=2)[:, :, :keys]
    chosen = chosen.reshape(-1, rows, queries // rows, rows, keys // rows)
    row = jnp.arange(rows)
    return seen & chosen[:, row, :, row]
