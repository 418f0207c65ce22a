"""Lengths of prompts and answers: lognormal, cut at a maximum.

A mean and a maximum are what is published about traffic, so they fix the law: its spread is such
that one of `TAIL` draws goes beyond the maximum.
"""

import dataclasses
import math
import statistics

import numpy as np

TAIL = 3000
"""One draw of so many is cut."""

_Z = statistics.NormalDist().inv_cdf(1 - 1 / TAIL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """A law of lengths in tokens.

    Attributes:
        mean: before the cut, which takes 0.3% off at a maximum of 27 times the mean.
        most: largest length.

    Raises:
        ValueError: a mean below 1 or above the maximum, or a maximum so far above the mean that no
            lognormal law reaches it once in `TAIL` draws.
    """

    mean: float
    most: int

    def __post_init__(self):
        if not 1 <= self.mean <= self.most:
            raise ValueError(f"a mean length of {self.mean:g} must be from 1 to {self.most}")
        if math.log(self.most / self.mean) > _Z**2 / 2:
            raise ValueError(
                f"a longest length of {self.most} is too far above the mean of {self.mean:g}: "
                f"give at most {self.mean * math.exp(_Z**2 / 2):.0f}"
            )

    @property
    def sigma(self) -> float:
        """Spread of the logarithm: mu + z sigma = log most, with mu = log mean - sigma^2 / 2."""
        return _Z - math.sqrt(max(_Z**2 - 2 * math.log(self.most / self.mean), 0.0))

    def scaled(self, factor: float) -> "Lengths":
        """The same shape at other sizes."""
        return Lengths(mean=self.mean * factor, most=max(round(self.most * factor), 1))

    def draw(self, count: int, *, seed: int) -> np.ndarray:
        """int64 [count], each from 1 to `most`."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        values = np.random.default_rng(seed).lognormal(mu, self.sigma, count)
        return np.clip(np.rint(values), 1, self.most).astype(np.int64)
