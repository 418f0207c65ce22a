"""When the requests of an open loop are sent: seconds from the start, first one at 0."""

from typing import Literal

import numpy as np

Process = Literal["poisson", "constant"]


def offsets(process: Process, rate: float, count: int, *, seed: int) -> np.ndarray:
    """Rising float64 [count].

    Args:
        process: "poisson" (exponential gaps, given that the last request is sent when it would be
            at constant gaps: the rate is what was asked for, however few requests there are) or
            "constant".
        rate: requests a second.
        count: requests.
        seed: of the gaps.

    Raises:
        ValueError: no positive rate, or no request.
    """
    if not rate > 0 or not np.isfinite(rate):
        raise ValueError(f"{rate=} must be positive and finite (requests a second)")
    if count < 1:
        raise ValueError(f"{count=} must be at least 1")
    if process == "constant":
        return np.arange(count) / rate
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count - 1))
    if count > 1:
        times *= (count - 1) / rate / times[-1]
    return np.concatenate([[0.0], times])
