"""Acceptance at given rates, to measure a server's speed without a trained drafter.

The text means nothing: drafts are kept or dropped by a coin, whatever the target thinks of them.
Everything else of a step (shapes, cache, cuts at eos) is as with a real rule.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.decode.acceptance import Accepted
from dskjax.decode.sampling import sample


@dataclasses.dataclass(frozen=True)
class SyntheticAcceptance:
    """Rates of acceptance; static.

    Attributes:
        rates: P(at least i+1 drafts accepted) for i = 0, 1, ..: unconditional, in [0, 1], falling.

    Raises:
        ValueError: a rate is out of range or larger than the one before.
    """

    rates: tuple[float, ...]

    def __post_init__(self):
        if any(not 0 <= rate <= 1 for rate in self.rates):
            raise ValueError(f"{self.rates=}: each must be in [0, 1]")
        if any(later > rate for rate, later in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(
                f"{self.rates=} must not rise: each is P(at least so many drafts accepted), "
                "which includes the next"
            )

    @classmethod
    def from_mean_length(cls, mean: float, m: int) -> "SyntheticAcceptance":
        """Rates alpha, alpha^2, .. alpha^m with 1 + their sum = `mean`: the mean accepted length.

        Raises:
            ValueError: `mean` is not in [1, m + 1].
        """
        if m < 0 or not 1 <= mean <= m + 1:
            raise ValueError(f"{mean=} must be in [1, {m + 1}]: {m} drafts and the target's token")

        def length(alpha: float) -> float:
            return math.fsum(alpha**i for i in range(m + 1))

        low, high = 0.0, 1.0
        while m and low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if length(middle) <= mean else (low, middle)
        alpha = high if length(high) <= mean else low
        return cls(tuple(alpha**i for i in range(1, m + 1)))


def accept_synthetic(
    drafts: Int[Array, "B m"],
    p: Float[Array, "B n X"],
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
    rates: tuple[float, ...],
) -> Accepted:
    """Keeps as many drafts as the rates say, then adds a token of the target's law there.

    Args:
        drafts: i32; a negative one is no draft, and neither it nor a later one is kept.
        p: target laws, n = m + 1.
        u_accept: the first of a row decides how many drafts stay.
        u_final: draws the added token.
        rates: those of a `SyntheticAcceptance`; static, and those beyond m are not used.

    Raises:
        ValueError: fewer rates than drafts.
    """
    batch, m = drafts.shape
    if len(rates) < m:
        raise ValueError(f"{len(rates)} synthetic rates for {m} drafts: give one for every draft")
    accepted = jnp.zeros(batch, jnp.int32)
    if m:
        # One uniform for all: P(u < rate_i) = rate_i, and the events are nested as they must be.
        stays = u_accept[:, :1] < jnp.asarray(rates[:m], u_accept.dtype)
        stays &= jnp.cumprod(drafts >= 0, axis=1).astype(bool)
        accepted = jnp.sum(stays, axis=1, dtype=jnp.int32)
    row = jnp.arange(batch)
    last = sample(p[row, accepted], u_final[row, accepted])
    slots = jnp.arange(m + 1)
    padded = jnp.pad(drafts.astype(jnp.int32), ((0, 0), (0, 1)))
    tokens = jnp.where(slots == accepted[:, None], last[:, None], padded)
    return Accepted(tokens=jnp.where(slots <= accepted[:, None], tokens, 0), count=accepted + 1)
