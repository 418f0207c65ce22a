"""What goes into a step beside the state, and what comes out for the host: rows of the batch."""

import dataclasses
import typing
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from dskjax.decode.logits import Logprobs

TIE_GAP = 1e-4
"""Gap of the two best logits below which a greedy choice counts as a tie: two correct programs may
differ there.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class DecodeRows:
    """Slots that decode in a step.

    Attributes:
        slots: i32 [B], each at most once; S or more is padding.
        page_table: i32 [B, W], pages with room for the rows of the step; -1 where there is none.
        draft_scale: f32 [K], factors of the dynamic draft temperature by depth.
    """

    slots: Int[Array, " B"]
    page_table: Int[Array, "B W"]
    draft_scale: Float[Array, " K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class PrefillRows:
    """Prompt rows of a step: of each sequence the next `query_lens` tokens, n at the most.

    A prompt of P tokens is prefilled up to its last token exclusive (P - 1 rows), which then starts
    decoding.

    Attributes:
        slots: i32 [B]; S or more is padding.
        page_table: i32 [B, W].
        token_ids: i32 [B, n].
        following: i32 [B, n, depths], the token 1, 2, .. places after each row. Where it lies
            beyond the known tokens any id will do: the first steps compute those rows again.
        cached_lens: i32 [B], tokens cached after this step.
        query_lens: i32 [B], rows in use; 0 for padding.
        targets: i32 [B, n], the token after each row, whose log-probability is wanted; None where
            nobody wants any.
    """

    slots: Int[Array, " B"]
    page_table: Int[Array, "B W"]
    token_ids: Int[Array, "B n"]
    following: Int[Array, "B n K"]
    cached_lens: Int[Array, " B"]
    query_lens: Int[Array, " B"]
    targets: Int[Array, "B n"] | None = None


class StepOutput(NamedTuple):
    """What a step hands to the host, one row a `DecodeRows` slot.

    Attributes:
        tokens: i32 [B, m + 1]; the first `count` are new.
        count: i32 [B], 0 for idle rows.
        accepted: i32 [B], drafts the rule accepted before any cut at a stop or limit.
        offered: i32 [B], drafts that were on the table.
        active: bool [B], rows that were decoding in this step.
        finished: bool [B], rows that ended in this step.
        ties: i32 [B], greedy tokens among the new ones whose top-2 logit gap was below `TIE_GAP`.
        overlap: f32 [B, m], sum_x min(p, q) of each tested draft; zeros in a program without the
            hybrid rule.
        logprobs: None in a program without logit features.
    """

    tokens: Int[Array, "B n"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    offered: Int[Array, " B"]
    active: Bool[Array, " B"]
    finished: Bool[Array, " B"]
    ties: Int[Array, " B"]
    overlap: Float[Array, "B m"]
    logprobs: Logprobs | None
