"""Learns at which temperature to draft, while serving: NumPy on the host, no randomness.

The hybrid rule draws drafts at T c_depth (a + b H) (`dskjax.decode.rules`). Any c keeps the text's
law, so c may be tried out on live traffic; the better one has the larger overlap sum_x min(p, q),
which is how often a draft is accepted.

Each depth climbs by itself on a ladder of factors ratio^j. It measures the factor it stands on and
its two neighbours in turn, so that a drift of the traffic weighs on all three alike, and keeps an
exponential mean of the overlap for every rung. When all three have enough measurements it moves to
the best of them, but away from where it stands only for a gain beyond `margin`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_TURNS = (0, 1, 0, -1)
"""Rungs tried in turn, from where a depth stands: half of the traffic runs at the best known."""


class DraftTemperature:
    """The factors c of the hybrid rule's draft temperature, one a depth.

    Attributes:
        best: f64 [m], the factor each depth stands on.
    """

    def __init__(
        self,
        depths: int,
        *,
        ratio: float = 1.15,
        low: float = 0.4,
        high: float = 2.0,
        window: int = 64,
        rate: float = 0.005,
        margin: float = 0.002,
    ):
        """Starts every depth at 1.

        Args:
            depths: m, at least 0.
            ratio: of neighbouring factors, > 1.
            low: no factor below this; at most 1.
            high: no factor above this; at least 1.
            window: measurements of each of the three rungs before a decision.
            rate: weight of a new measurement in a rung's mean (an average until 1/rate of them).
            margin: gain in overlap for which it is worth moving.

        Raises:
            ValueError: a value is out of range.
        """
        if depths < 0 or window < 1:
            raise ValueError(f"{depths=} must be 0 or more, and {window=} at least 1")
        if not (1 < ratio < np.inf and 0 < low <= 1 <= high < np.inf):
            raise ValueError(
                f"{ratio=}, {low=}, {high=} must be ratio > 1 and 0 < low <= 1 <= high"
            )
        if not (0 < rate <= 1 and margin >= 0):
            raise ValueError(f"{rate=} must be in (0, 1], and {margin=} at least 0")
        below, above = (int(np.log(x) / np.log(ratio) + 1e-9) for x in (1 / low, high))
        self._ladder = ratio ** np.arange(-below, above + 1, dtype=np.float64)
        self._at = np.full(depths, below)
        self._turn = 0
        self._mean = np.zeros((depths, len(self._ladder)))
        self._seen = np.zeros((depths, len(self._ladder)), np.int64)  # ever, for the mean
        self._fresh = np.zeros((depths, len(self._ladder)), np.int64)  # since the last decision
        self._window, self._rate, self._margin = window, rate, margin

    @property
    def best(self) -> Float[np.ndarray, " m"]:
        """The factor each depth stands on, float64 [m]."""
        return self._ladder[self._at]

    @property
    def scale(self) -> Float[np.ndarray, " m"]:
        """The factors to draft with next, f32 [m]: `best`, or a neighbour whose turn it is."""
        rungs = np.clip(self._at + _TURNS[self._turn], 0, len(self._ladder) - 1)
        return self._ladder[rungs].astype(np.float32)

    def update(
        self,
        depth_overlaps: Sequence[float] | Float[np.ndarray, " m"],
        used_scale: Sequence[float] | Float[np.ndarray, " m"],
    ) -> None:
        """Takes in one step's overlaps, decides where due, and passes the turn on.

        Args:
            depth_overlaps: mean overlap of the hybrid rows at each depth; NaN where none was
                drafted or reached.
            used_scale: the `scale` those drafts were drawn with; it may be an older one, as steps
                are read late.

        Raises:
            ValueError: not one value a depth, or a factor that is none of this ladder's.
        """
        overlaps = np.asarray(depth_overlaps, np.float64)
        used = np.asarray(used_scale, np.float64)
        if overlaps.shape != self._at.shape or used.shape != self._at.shape:
            raise ValueError(
                f"overlaps {overlaps.shape} and scale {used.shape}: give {len(self._at)} values"
            )
        rungs = np.abs(self._ladder - used[:, None]).argmin(axis=1)
        if not (np.abs(self._ladder[rungs] - used) <= 1e-5 * used).all():
            raise ValueError(f"used_scale={used.tolist()} is not a scale that this tuner gave out")
        for depth in np.flatnonzero(np.isfinite(overlaps)):
            rung = rungs[depth]
            self._seen[depth, rung] += 1
            self._fresh[depth, rung] += 1
            weight = max(self._rate, 1 / self._seen[depth, rung])
            self._mean[depth, rung] += weight * (overlaps[depth] - self._mean[depth, rung])
            self._decide(int(depth))
        self._turn = (self._turn + 1) % len(_TURNS)

    def _decide(self, depth: int) -> None:
        here = self._at[depth]
        near = [r for r in (here - 1, here, here + 1) if 0 <= r < len(self._ladder)]
        if self._fresh[depth, near].min() < self._window:
            return
        self._fresh[depth] = 0
        best = max(near, key=lambda rung: self._mean[depth, rung])
        if self._mean[depth, best] > self._mean[depth, here] + self._margin:
            self._at[depth] = best
