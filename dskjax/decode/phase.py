"""Where a row stands: inside its thinking block or outside of it, token by token.

A thinking block begins after the token `<think>` and ends after `</think>`. Both phases of a row
can meet in one step, so a rule that treats them differently asks for the phase of every slot
(`thinking_slots`), and the phase that the next step starts in follows from what was emitted
(`thinking_after`).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class ThinkIds:
    """Ids of the two markers; static. None: the tokenizer has no such token, the phase never turns.

    Attributes:
        open: id of `<think>`.
        close: id of `</think>`.

    Raises:
        ValueError: one id for both.
    """

    open: int | None = None
    close: int | None = None

    def __post_init__(self):
        if self.open is not None and self.open == self.close:
            raise ValueError(f"open and close are both {self.open}: give two different ids")


def thinking_slots(
    thinking: Bool[Array, " B"], tokens: Int[Array, "B m"], think: ThinkIds
) -> Bool[Array, "B n"]:
    """Phase before each of m tokens and after the last, n = m + 1.

    Slot i is the phase in which token i is decided: that of `thinking`, turned by tokens 0 .. i-1.
    `</think>` itself still belongs to the thinking, `<think>` does not.

    Args:
        thinking: phase before the first token.
        tokens: i32, a negative id turns nothing.
        think: the markers.
    """
    phases = [thinking]
    for i in range(tokens.shape[1]):
        phase = phases[-1]
        if think.open is not None:
            phase = phase | (tokens[:, i] == think.open)
        if think.close is not None:
            phase = phase & (tokens[:, i] != think.close)
        phases.append(phase)
    return jnp.stack(phases, axis=1)


def thinking_after(
    thinking: Bool[Array, " B"], tokens: Int[Array, "B n"], count: Int[Array, " B"], think: ThinkIds
) -> Bool[Array, " B"]:
    """Phase after a step that emitted the first `count` (0 to n) of `tokens`."""
    emitted = jnp.arange(tokens.shape[1]) < count[:, None]
    return thinking_slots(thinking, jnp.where(emitted, tokens, -1), think)[:, -1]
