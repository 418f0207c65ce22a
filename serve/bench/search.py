"""The highest rate that keeps the objectives: a geometric bracket, then bisection. Pure.

Assumes that what fails at a rate fails above it.
"""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One rate that was tried.

    Attributes:
        rate: requests a second.
        met: the objectives were kept.
        summary: figures of the run.
    """

    rate: float
    met: bool
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The end of a search.

    Attributes:
        best: the highest rate that kept the objectives; None if none did.
        bounded: a higher rate is known to fail, by no more than the tolerance.
        curve: all points, by rate.
    """

    best: Point | None
    bounded: bool
    curve: list[Point]


async def find_rate(
    probe: Callable[[float], Awaitable[Point]],
    *,
    start: float,
    tolerance: float = 0.05,
    factor: float = 2.0,
    most: int = 16,
) -> Found:
    """Tries rates until a passing and a failing one are within `tolerance` of each other.

    Args:
        probe: measures a rate.
        start: first rate, requests a second.
        tolerance: how far above the best rate the next failing one may be, as a share.
        factor: step of the bracket.
        most: probes in all; what was found by then is returned.

    Raises:
        ValueError: a value is out of range.
    """
    if not start > 0 or not tolerance > 0 or not factor > 1 or most < 1:
        raise ValueError(
            f"{start=} and {tolerance=} must be positive, {factor=} above 1, {most=} at least 1"
        )
    low: Point | None = None
    high: Point | None = None
    curve: list[Point] = []
    while len(curve) < most:
        if low is None and high is None:
            rate = start
        elif low is None:
            assert high is not None
            rate = high.rate / factor
        elif high is None:
            rate = low.rate * factor
        elif high.rate > low.rate * (1 + tolerance):
            rate = math.sqrt(low.rate * high.rate)
        else:
            break
        point = await probe(rate)
        curve.append(point)
        if point.met:
            low = point
        else:
            high = point
    bounded = low is not None and high is not None and high.rate <= low.rate * (1 + tolerance)
    return Found(best=low, bounded=bounded, curve=sorted(curve, key=lambda p: p.rate))
