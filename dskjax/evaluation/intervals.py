"""95% intervals of what was measured on a sample: a ratio of sums, and a share."""

import math

import numpy as np

RESAMPLES = 1000
"""Bootstrap resamples."""

_Z = 1.959963984540054  # normal quantile of 97.5%


def bootstrap(parts: np.ndarray, wholes: np.ndarray) -> list[float]:
    """Percentile interval of sum(parts) / sum(wholes), the rows drawn again with replacement.

    The same rows give the same interval. A resample whose wholes sum to 0 counts as 0.

    Args:
        parts: [N], one number a document, prompt or whatever was sampled.
        wholes: [N].
    """
    picks = np.random.default_rng(0).integers(0, len(parts), (RESAMPLES, len(parts)))
    ratios = parts[picks].sum(axis=1) / np.maximum(wholes[picks].sum(axis=1), 1)
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def wilson(share: float, count: int) -> list[float]:
    """Wilson's score interval of a share of `count` independent trials.

    Unlike the normal one it stays within 0..1 and is not empty at 0 or 1.
    """
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    spread = share * (1 - share) / count + _Z**2 / (4 * count**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / count)
    # The outer limits of 0 and 1 are these numbers, but for the rounding of the formula.
    return [middle - half if share > 0 else 0.0, middle + half if share < 1 else 1.0]
