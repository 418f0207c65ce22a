"""A Prometheus histogram that takes many equal observations in one cheap call.

`prometheus_client.Histogram` takes one value a call and walks its buckets for each; a server with
speculative decoding observes several tokens of every answer in every step.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """The observations under one set of label values. Any thread may observe."""

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` times."""
        bucket = bisect_left(self._bounds, value)  # the first bound that is >= value
        with self._lock:
            self._counts[bucket] += times
            self._sum += value * times

    def snapshot(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum of all values."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        buckets, below = [], 0
        for bound, count in zip([*self._bounds, math.inf], counts, strict=True):
            below += count
            buckets.append((floatToGoString(bound), float(below)))
        return buckets, total


class Histogram(Collector):
    """A family of series, one for each set of label values that was asked for."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ):
        if list(buckets) != sorted(set(buckets)) or not buckets:
            raise ValueError(f"{name}: {buckets=} must be increasing upper bounds, at least one")
        self._name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        self._bounds = tuple(buckets)
        self._series: dict[tuple[str, ...], Series] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series of these label values; keep it rather than ask again."""
        if len(values) != len(self._labels):
            raise ValueError(f"{self._name}: {values=} must be one for each of {self._labels}")
        with self._lock:
            return self._series.setdefault(values, Series(self._bounds))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The family, as a registry asks for it."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        with self._lock:
            series = list(self._series.items())
        for values, one in series:
            buckets, total = one.snapshot()
            family.add_metric(values, buckets=buckets, sum_value=total)
        yield family
