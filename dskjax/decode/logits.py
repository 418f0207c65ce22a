"""What a request does to its logits before they become probabilities: penalties, biases, forbidden
stops; and the log-probabilities it asks for, of its answer and of its prompt.

Row i of a verification step is the law of a token that follows the drafts before it, so those
drafts count as said: the penalties of row i see them, as if they had been emitted one at a time.
Each part runs only when some row of the batch wants it (`jax.lax.cond`), in one program.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

TOP_LOGPROBS = 20
"""Alternatives whose log-probabilities a step returns."""
SCORED_ROWS = 128
"""Prompt rows whose logits are there at the same time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class LogitRows:
    """How the logits of each row are changed, [B] arrays.

    Attributes:
        presence: f32 [B], taken from the logit of each token the answer has.
        frequency: f32 [B], taken once per occurrence.
        repetition: f32 [B], divides positive and multiplies negative logits of tokens in prompt or
            answer; 1 is off.
        bias_ids: i32 [B, N], tokens with a bias; -1 is unused.
        bias: f32 [B, N].
        min_length: i32 [B], position before which no stop token may stand.
        logprobs: bool [B], the row wants log-probabilities.
    """

    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    min_length: jax.Array
    logprobs: jax.Array

    @classmethod
    def row(
        cls,
        *,
        presence: float = 0.0,
        frequency: float = 0.0,
        repetition: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        places: int,
        min_length: int = 0,
        logprobs: bool = False,
    ) -> dict[str, Any]:
        """NumPy values of one row, by field.

        Args:
            presence: see the class.
            frequency: see the class.
            repetition: see the class.
            logit_bias: token id -> bias.
            places: N, places for biases.
            min_length: see the class.
            logprobs: see the class.
        """
        biases = logit_bias or {}
        ids, values = np.full(places, -1, np.int32), np.zeros(places, np.float32)
        ids[: len(biases)] = list(biases)
        values[: len(biases)] = list(biases.values())
        return {
            "presence": np.float32(presence),
            "frequency": np.float32(frequency),
            "repetition": np.float32(repetition),
            "bias_ids": ids,
            "bias": values,
            "min_length": np.int32(min_length),
            "logprobs": np.bool_(logprobs),
        }


class Said(NamedTuple):
    """Tokens of each slot: i32 [S, X] times it stands in the answer, bool [S, X] in the prompt."""

    counts: Int[Array, "S X"]
    in_prompt: Bool[Array, "S X"]


def penalised(rows: LogitRows) -> Bool[Array, " B"]:
    """Rows with any of the three penalties on."""
    return (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)


def adjust(
    logits: Float[Array, "B n X"],
    rows: LogitRows,
    said: Said,
    slots: Int[Array, " B"],
    tokens: Int[Array, "B n"],
    position: Int[Array, " B"],
    stop_ids: Int[Array, "B S"],
) -> Float[Array, "B n X"]:
    """Logits after penalties, biases and forbidden stops, in that order.

    Args:
        logits: of the model.
        rows: what to do.
        said: counts of every slot, the last token included and the drafts not.
        slots: the rows' slots.
        tokens: last token, then drafts: row i follows tokens[:, :i + 1].
        position: of the token that row 0 draws.
        stop_ids: ids that `min_length` forbids; -1 is unused.
    """
    vocab, places = logits.shape[-1], jnp.arange(logits.shape[1], dtype=jnp.int32)

    def with_penalties(logits: Array) -> Array:
        drafts = jax.nn.one_hot(tokens[:, 1:], vocab, dtype=jnp.int32)
        drafted = jnp.pad(jnp.cumsum(drafts, axis=1), ((0, 0), (1, 0), (0, 0)))
        counts = said.counts[slots][:, None] + drafted
        seen = (counts > 0) | said.in_prompt[slots][:, None]
        presence, frequency, repetition = (
            x[:, None, None] for x in (rows.presence, rows.frequency, rows.repetition)
        )
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(seen & (repetition != 1), scaled, logits)
        return logits - presence * (counts > 0) - frequency * counts

    def with_bias(logits: Array) -> Array:
        ids = jnp.where(rows.bias_ids < 0, vocab, rows.bias_ids)
        batch = jnp.arange(logits.shape[0])[:, None]
        total = jnp.zeros((logits.shape[0], vocab), logits.dtype)
        return logits + total.at[batch, ids].add(rows.bias, mode="drop")[:, None]

    too_early = position[:, None] + places < rows.min_length[:, None]

    def without_stops(logits: Array) -> Array:
        ids = jnp.where(stop_ids < 0, vocab, stop_ids)
        batch = jnp.arange(logits.shape[0])[:, None]
        stops = jnp.zeros((logits.shape[0], vocab), bool).at[batch, ids].set(True, mode="drop")
        return jnp.where(too_early[:, :, None] & stops[:, None], -jnp.inf, logits)

    def only_if(wanted: Array, change: Any, logits: Array) -> Array:
        return jax.lax.cond(jnp.any(wanted), change, lambda x: x, logits)

    logits = only_if(penalised(rows), with_penalties, logits)
    logits = only_if(rows.bias_ids >= 0, with_bias, logits)
    return only_if(too_early, without_stops, logits)


def count_said(
    said: Said,
    rows: LogitRows,
    slots: Int[Array, " B"],
    tokens: Int[Array, "B n"],
    count: Int[Array, " B"],
) -> Said:
    """Adds the first `count` tokens of each row to its slot; rows without penalties are left."""
    new = (jnp.arange(tokens.shape[1]) < count[:, None]) & penalised(rows)[:, None]
    ids = jnp.where(new, tokens, said.counts.shape[1])
    return said._replace(counts=said.counts.at[slots[:, None], ids].add(1, mode="drop"))


class Logprobs(NamedTuple):
    """Natural logarithms under the model's own distribution, zeros where no row wants any.

    Attributes:
        chosen: f32 [B, n], of the emitted tokens.
        top_ids: i32 [B, n, 20], best first.
        top: f32 [B, n, 20].
    """

    chosen: Float[Array, "B n"]
    top_ids: Int[Array, "B n k"]
    top: Float[Array, "B n k"]


def logprobs(
    logits: Float[Array, "B n X"], tokens: Int[Array, "B n"], wanted: Bool[Array, " B"]
) -> Logprobs:
    """Log-probabilities of `tokens` and of the best alternatives, before any change of the logits.

    A vocabulary of fewer than 20 tokens gives as many alternatives as it has.
    """

    def compute() -> Logprobs:
        return _logprobs(logits, tokens)

    def nothing() -> Logprobs:
        shape = (*tokens.shape, min(TOP_LOGPROBS, logits.shape[-1]))
        return Logprobs(
            jnp.zeros(tokens.shape, jnp.float32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )

    return jax.lax.cond(jnp.any(wanted), compute, nothing)


def prompt_logprobs(
    hidden: Float[Array, "B n D"], tokens: Int[Array, "B n"], head: Callable[[Array], Array]
) -> Logprobs:
    """Log-probabilities of the tokens that follow prompt rows, and of the best alternatives.

    fp32 logits of a whole chunk would be gigabytes, so `SCORED_ROWS` rows take turns.

    Args:
        hidden: of the rows, after the final norm.
        tokens: that follow them.
        head: logits [.., X] of hidden states [.., D].
    """

    def score(row: tuple[Array, Array]) -> Logprobs:
        return _logprobs(head(row[0]), row[1])

    rows = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    with jax.named_scope("prompt_logprobs"):
        found = jax.lax.map(score, rows, batch_size=min(SCORED_ROWS, tokens.size))
    return jax.tree.map(lambda x: x.reshape(*tokens.shape, *x.shape[1:]), found)


def _logprobs(logits: Float[Array, "*B X"], tokens: Int[Array, "*B"]) -> Logprobs:
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(log_probs, min(TOP_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return Logprobs(chosen, ids.astype(jnp.int32), top)
