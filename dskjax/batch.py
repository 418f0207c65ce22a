"""A ragged batch: new tokens of several sequences against the paged cache, and the row bookkeeping
of one step.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import (
    MlaDecodePlan,
    MlaPrefillPlan,
    plan_mla_decode,
    schedule_mla_decode,
)

Form = Literal["absorbed", "expanded"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class RaggedBatch:
    """New tokens of B sequences, one after another. A mixed step is a tuple of these, one per form.

    A sequence's rows are its newest cached tokens: row i of n stands at position cached_lens - n +
    i. Rows at a negative position (an idle sequence with cached_lens 0) and rows past
    query_starts[-1] are padding: they write nothing, see nothing, and their outputs mean nothing.

    Attributes:
        token_ids: i32 [T].
        page_table: i32 [B, W], page ids of each sequence; entries past its length may be anything.
        cached_lens: i32 [B], cached tokens of each sequence after this step, the new ones included.
        query_starts: i32 [B + 1], first row of each sequence.
        form: "absorbed" for short queries (decode, MTP verification), "expanded" for prefill
            chunks.
        queries: rows per sequence when they are all the same (T == B * queries), else None.
        query_lens: i32 [B] with `queries`: only so many rows of each sequence are real, the rest of
            its rows is padding. None: all of them.
    """

    token_ids: jax.Array
    page_table: jax.Array
    cached_lens: jax.Array
    query_starts: jax.Array
    form: Form = dataclasses.field(metadata={"static": True})
    queries: int | None = dataclasses.field(default=None, metadata={"static": True})
    query_lens: jax.Array | None = None

    @classmethod
    def uniform(
        cls,
        token_ids: jax.Array,
        page_table: jax.Array,
        cached_lens: jax.Array,
        form: Form,
        query_lens: jax.Array | None = None,
    ) -> "RaggedBatch":
        """A batch with the same number of rows for every sequence, token_ids i32 [B, n], of which
        the first `query_lens` are real.
        """
        sequences, queries = token_ids.shape
        starts = jnp.arange(sequences + 1, dtype=jnp.int32) * queries
        return cls(
            token_ids.reshape(-1), page_table, cached_lens, starts, form, queries, query_lens
        )

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.token_ids.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class BatchPlan:
    """What every layer needs to know of a batch; computed once a step.

    Attributes:
        positions: i32 [T], 0 for padding.
        pages: i32 [T], page each row is written to; -1 writes nothing.
        slots: i32 [T], place in that page.
        decode: plan of `mla_decode` (its `visible` is position + 1, so both forms share it).
        prefill: plan of `mla_prefill` over the pages of every sequence laid side by side; None for
            an absorbed batch.
    """

    positions: jax.Array
    pages: jax.Array
    slots: jax.Array
    decode: MlaDecodePlan
    prefill: MlaPrefillPlan | None


def plan_batch(batch: RaggedBatch, page_size: int, heads: int | None = None) -> BatchPlan:
    """Computes the bookkeeping of one step. Rows past the page table's width are dropped rather
    than written astray. With the number of query heads, GPU kernels need no plan in each layer.
    """
    ends, lens, queries = batch.cached_lens, batch.query_lens, batch.queries
    if lens is not None and queries is not None:
        ends = ends + queries - lens  # as if the padding rows were cached; then they are hidden
    decode = plan_mla_decode(ends, batch.query_starts, batch.num_tokens, queries=queries)
    if lens is not None and queries is not None:
        row = jnp.arange(batch.num_tokens, dtype=jnp.int32) % queries
        shown = jnp.where(row < lens[decode.token_seq], decode.visible, 0)
        decode = dataclasses.replace(decode, visible=shown)
    if heads is not None and batch.form == "absorbed":
        decode = schedule_mla_decode(decode, batch.page_table, heads)
    position = decode.visible - 1
    real = position >= 0
    positions = jnp.where(real, position, 0)
    column = positions // page_size
    width = batch.page_table.shape[1]
    pages = batch.page_table[decode.token_seq, jnp.minimum(column, width - 1)]
    pages = jnp.where(real & (column < width), pages, -1)
    prefill = None
    if batch.form == "expanded":
        keys = width * page_size
        key_pos = jnp.arange(keys, dtype=jnp.int32)
        sequences = jnp.arange(batch.page_table.shape[0], dtype=jnp.int32)[:, None]
        key_seq = jnp.where(key_pos < batch.cached_lens[:, None], sequences, -1)
        prefill = MlaPrefillPlan(
            query_seq=jnp.where(real, decode.token_seq, -1),
            query_pos=positions,
            key_seq=key_seq.reshape(-1),
            key_pos=jnp.broadcast_to(key_pos, key_seq.shape).reshape(-1),
            rows=batch.page_table.shape[0] if batch.queries is not None else 1,
        )
    return BatchPlan(positions, pages, positions % page_size, decode, prefill)
