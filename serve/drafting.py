"""How many drafts a step verifies: as many as make the most tokens a second.

A step with m drafts brings 1 + r * m tokens a row, r being the share of offered drafts that are
accepted, and takes a time that depends on the batch: verifying is nearly free while a step waits
for memory, and costs its full share of arithmetic once it does not. Both are measured while the
engine runs, per batch bucket, so nothing has to be profiled beforehand.
"""

from collections.abc import Sequence

_WEIGHT = 0.1  # of the newest measurement in each running mean


class DraftPolicy:
    """Picks a rung of `ladder` for every step; deterministic.

    It begins with the most drafts. Every `probe_every` steps of a bucket it runs another rung for
    `probe_steps` steps, whose measurements may make it change: to a rung that makes more tokens a
    second by a factor of `1 + margin`.

    Args:
        ladder: numbers of drafts to choose from, rising; one of them alone is fixed.
        buckets: largest batch of each bucket, rising; bigger batches count for the last.
        margin: how much better another rung must be.
        probe_every: steps between two probes.
        probe_steps: steps of a probe; after a step with fewer drafts the first one has none to
            verify, so at least 2.

    Raises:
        ValueError: an empty or unordered ladder or buckets, or a number out of range.
    """

    def __init__(
        self,
        ladder: Sequence[int],
        buckets: Sequence[int],
        *,
        margin: float = 0.05,
        probe_every: int = 256,
        probe_steps: int = 4,
    ):
        if not ladder or ladder[0] < 0 or list(ladder) != sorted(set(ladder)):
            raise ValueError(f"ladder={list(ladder)}: give rising numbers of drafts from 0")
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"buckets={list(buckets)}: give rising batch sizes from 1")
        if margin < 0 or not 2 <= probe_steps < probe_every:
            raise ValueError(
                f"{margin=} must be 0 or more, {probe_steps=} at least 2, {probe_every=} above it"
            )
        self.ladder = tuple(ladder)
        self._tops = tuple(buckets)
        self._margin = margin
        self._every = probe_every
        self._steps = probe_steps
        self._buckets = [_Bucket(len(ladder)) for _ in buckets]
        self._rates: list[float | None] = [None] * len(ladder)

    def choose(self, batch: int) -> int:
        """Drafts of the next step, which decodes `batch` rows."""
        if len(self.ladder) == 1:
            return self.ladder[0]
        bucket = self._buckets[self._bucket(batch)]
        bucket.count += 1
        into = bucket.count % self._every
        if bucket.count >= self._every and into < self._steps:
            probe = bucket.count // self._every % (len(self.ladder) - 1)
            return self.ladder[probe + (probe >= bucket.rung)]
        return self.ladder[bucket.rung]

    def pick(self, batch: int, most: int) -> int:
        """`choose`, with no more drafts than any row wants to verify.

        Rows that want fewer see to that themselves; a step of a number that no rung has does not
        exist.
        """
        enough = next(rung for rung in self.ladder if rung >= min(most, self.ladder[-1]))
        return min(self.choose(batch), enough)

    def observe(self, batch: int, drafts: int, seconds: float, accepted: int, offered: int) -> None:
        """Takes in a step.

        Args:
            batch: rows it decoded.
            drafts: its drafts, a rung of the ladder.
            seconds: what it took, from one result to the next when steps overlap.
            accepted, offered: drafts accepted and tested, all rows together.
        """
        rung = self.ladder.index(drafts)
        bucket = self._buckets[self._bucket(batch)]
        bucket.seconds[rung] = _mean(bucket.seconds[rung], seconds)
        if offered:
            self._rates[rung] = _mean(self._rates[rung], accepted / offered)
        current = self._speed(bucket, bucket.rung)
        if current is None:
            return
        speeds = [(self._speed(bucket, other) or 0.0, other) for other in range(len(self.ladder))]
        best, other = max(speeds)
        if best > current * (1 + self._margin):
            bucket.rung = other

    def speed(self, batch: int, drafts: int) -> float | None:
        """Tokens a second of one row, as measured; None before it was."""
        return self._speed(self._buckets[self._bucket(batch)], self.ladder.index(drafts))

    def _speed(self, bucket: "_Bucket", rung: int) -> float | None:
        seconds, drafts, rate = bucket.seconds[rung], self.ladder[rung], self._rates[rung]
        if seconds is None or (drafts and rate is None):
            return None
        return (1 + drafts * (rate or 0.0)) / max(seconds, 1e-9)

    def _bucket(self, batch: int) -> int:
        tops = self._tops
        return next((i for i, top in enumerate(tops) if batch <= top), len(tops) - 1)


class _Bucket:
    """Measurements of one batch size: the rung in use, steps so far, mean seconds by rung."""

    __slots__ = ("count", "rung", "seconds")

    def __init__(self, rungs: int):
        self.rung = rungs - 1
        self.count = 0
        self.seconds: list[float | None] = [None] * rungs


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
