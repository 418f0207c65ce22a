"""What a frozen trunk says about the next token, kept small enough to be kept.

Of each row's logits the `top_k` largest stay, with the log-sum-exp of all of them: from these the
likeliest tokens' probabilities are exact at any temperature that was asked for, and so is what is
left for all other tokens together (the tail). Full logits exist for a few columns at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.model import logits_of
from train_mtp.loss import columns_at_once, join_columns, shift_left, split_columns

BLOCK = 16
"""Neighbours that `largest` first looks at as one."""


class Teacher(NamedTuple):
    """The trunk's law at every row; row i is about token i + 1.

    Attributes:
        ids: i32 [B, S, K], the likeliest tokens, best first; ties go to the lowest id.
        logits: fp32 [B, S, K], theirs.
        lse: fp32 [N, B, S], log-sum-exp of all logits over each of N temperatures.
    """

    ids: Int[Array, "B S K"]
    logits: Float[Array, "B S K"]
    lse: Float[Array, "N B S"]

    def ahead(self, by: int) -> "Teacher":
        """The law `by` rows on: what depth `by` at each anchor is compared with."""
        return Teacher(
            shift_left(self.ids, by),
            shift_left(self.logits, by),
            jax.vmap(lambda x: shift_left(x, by))(self.lse),
        )


def teach(
    hidden_bsd: Float[Array, "B S D"],
    weight_xd: Float[Array, "X D"],
    *,
    top_k: int,
    temperatures: tuple[float, ...],
    devices: int = 1,
) -> Teacher:
    """The trunk's law from its hidden states after the final norm; nothing is differentiated.

    Args:
        hidden_bsd: hidden states.
        weight_xd: weight of the output head.
        top_k: tokens kept a row; all of them if the vocabulary is smaller.
        temperatures: positive ones at which probabilities will be wanted.
        devices: over how many devices the rows are spread (for the size of a chunk).
    """
    hidden_bsd = jax.lax.stop_gradient(hidden_bsd)
    weight = jax.lax.stop_gradient(weight_xd).astype(hidden_bsd.dtype)
    vocab = weight.shape[0]
    columns = columns_at_once(hidden_bsd.shape[0], vocab, devices)

    def chunk(hidden_bcd: jax.Array) -> tuple[jax.Array, ...]:
        with jax.named_scope("teacher"):
            logits = logits_of(hidden_bcd, weight)
            top, ids = largest(logits, min(top_k, vocab))
            lse = (jax.nn.logsumexp(logits / t, axis=-1) for t in temperatures)
            return (ids, top, *lse)

    parts = jax.lax.map(chunk, split_columns(hidden_bsd, columns))
    ids, top, *lse = (join_columns(part, hidden_bsd.shape[1]) for part in parts)
    return Teacher(ids, top, jnp.stack(lse))


def largest(logits_x: Float[Array, "... X"], count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest numbers and their indices int32, as `jax.lax.top_k` gives them, without
    a sort of whole rows: XLA makes one of it where `count` is more than 16.

    They lie in the `count` blocks of neighbours that have the largest maxima, so these are found
    first, and then only numbers of theirs are sorted.
    """
    size = logits_x.shape[-1]
    blocks = -(-size // BLOCK)
    if blocks <= 2 * count:
        top, ids = jax.lax.top_k(logits_x, count)
        return top, ids.astype(jnp.int32)
    lead = logits_x.shape[:-1]
    edges = ((0, 0),) * len(lead) + ((0, blocks * BLOCK - size),)
    by_block = jnp.pad(logits_x, edges, constant_values=-jnp.inf).reshape(*lead, blocks, BLOCK)
    _, chosen = jax.lax.top_k(by_block.max(axis=-1), count)
    chosen = jnp.sort(chosen, axis=-1)  # so that ties go to the lowest index
    some = jnp.take_along_axis(by_block, chosen[..., None], axis=-2).reshape(*lead, -1)
    top, place = jax.lax.top_k(some, count)
    block = jnp.take_along_axis(chosen, place // BLOCK, axis=-1)
    return top, (block * BLOCK + place % BLOCK).astype(jnp.int32)
