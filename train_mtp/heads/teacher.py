"""What a frozen trunk says about the next token, kept small enough to be kept.

Of each row's logits the `top_k` largest stay, with the log-sum-exp of all of them: from these the
likeliest tokens' probabilities are exact at any temperature that was asked for, and so is what is
left for all other tokens together (the tail). Full logits exist for a few columns at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train_mtp.loss import columns_at_once, join_columns, shift_left, split_columns


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
            logits = jnp.einsum(
                "bcd,xd->bcx", hidden_bcd, weight, preferred_element_type=jnp.float32
            )
            top, ids = jax.lax.top_k(logits, min(top_k, vocab))
            lse = (jax.nn.logsumexp(logits / t, axis=-1) for t in temperatures)
            return (ids.astype(jnp.int32), top, *lse)

    parts = jax.lax.map(chunk, split_columns(hidden_bsd, columns))
    ids, top, *lse = (join_columns(part, hidden_bsd.shape[1]) for part in parts)
    return Teacher(ids, top, jnp.stack(lse))
