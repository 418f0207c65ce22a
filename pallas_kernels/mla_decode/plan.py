"""Which cached rows each query of a ragged decode batch sees; computed once a step, used by every
layer.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.mla_decode.work import TILE, Work, rank, share_out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class MlaDecodePlan:
    """Row bookkeeping of a decode batch.

    Attributes:
        token_seq: i32 [T], the sequence a query row belongs to (0 for rows past the last sequence).
        visible: i32 [T], how many cached rows of its sequence the query sees; 0 or less for empty
            rows.
        work: who attends to what, from `with_work`; only GPU kernels need it.
        queries: query rows per sequence when all have the same number, else None.
    """

    token_seq: jax.Array
    visible: jax.Array
    work: Work | None = None
    queries: int | None = dataclasses.field(default=None, metadata={"static": True})


def plan_mla_decode(
    cached_lens: Int[Array, " B"],
    query_starts: Int[Array, " B+1"],
    num_tokens: int,
    *,
    queries: int | None = None,
) -> MlaDecodePlan:
    """Plans a batch whose last query row of a sequence is its newest cached row (causal among the
    new rows).

    Args:
        cached_lens: cached rows of each sequence, the new ones included; 0 for an idle sequence.
        query_starts: first query row of each sequence; its last entry is the number of rows in use.
        num_tokens: T, the static number of query rows; rows past query_starts[-1] are padding.
        queries: rows per sequence, if the caller knows that they are equal (T == B * queries).
    """
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    sequences = cached_lens.shape[0]
    seq = jnp.clip(rank(query_starts[1:], rows, "right"), 0, sequences - 1).astype(jnp.int32)
    lens = query_starts[1:] - query_starts[:-1]
    visible = cached_lens[seq] - lens[seq] + (rows - query_starts[seq]) + 1
    return MlaDecodePlan(
        seq, jnp.where(rows < query_starts[-1], visible, 0).astype(jnp.int32), queries=queries
    )


def with_work(
    plan: MlaDecodePlan, page_table: Int[Array, "B W"], heads: int, sms: int
) -> MlaDecodePlan:
    """Adds the list of work of the GPU kernels.

    Args:
        plan: with its final `visible`; without `queries` each row becomes a group of its own.
        page_table: as for the op.
        heads: query heads of the op.
        sms: thread blocks that run at the same time.
    """
    queries, pages = plan.queries, page_table
    if queries is None:
        queries, pages = 1, page_table[plan.token_seq]
    visible = plan.visible.reshape(-1, queries)
    row_tiles = -(-queries * heads // TILE)
    return dataclasses.replace(plan, work=share_out(visible, pages, row_tiles=row_tiles, sms=sms))
