"""The order in which requests get prompt rows: priority, then the starved, then the short.

One key orders the waiting and those in the middle of their prompt, so that a short request passes a
long one between two chunks. A request that was passed by too often or for too long goes to the head
of its priority for one chunk; a preempted one stands there from the start.
"""

import bisect
from collections import OrderedDict

from serve.blocks import Chain
from serve.plan import TokenLogprob
from serve.request import Request
from serve.scheduler_config import SchedulerConfig

Key = tuple[int, int, int, float, int]


class Entry:
    """What a scheduler keeps of a request beside the request itself.

    Attributes:
        request: the request.
        chain: hash keys of its pages.
        number: counts requests; settles ties of arrival.
        key: its place in the order, as of when that was last looked at.
        uncached: prompt rows to compute, as far as known: while it waits an estimate from the time
            it came.
        shared: pages of the prefix cache it was admitted with.
        urgent: goes to the head of its priority.
        requeue: preempted; waits again when its last step is over.
        round, since: the round and time from which its waiting counts.
        prompt_logprobs: of a scored request, what is known of its prompt's tokens from the second
            on.
    """

    __slots__ = (
        "chain",
        "key",
        "number",
        "prompt_logprobs",
        "request",
        "requeue",
        "round",
        "shared",
        "since",
        "uncached",
        "urgent",
    )

    def __init__(self, request: Request, chain: Chain, number: int):
        self.request = request
        self.chain = chain
        self.number = number
        self.uncached = len(request.tokens) - 1
        self.key: Key = (0, 0, 0, 0.0, 0)
        self.shared = 0
        self.urgent = False
        self.requeue = False
        self.round = 0
        self.since = 0.0
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def rank(self) -> tuple[int, float, int]:
        """Who keeps its pages when they run out: the smallest."""
        return (self.request.priority, self.request.arrival, self.number)


class WaitingQueue:
    """Requests without a slot, best first, and the count of rounds that starvation is measured in.

    A round is a step with prompt rows.
    """

    def __init__(self, config: SchedulerConfig):
        self._config = config
        self._order: list[tuple[Key, Entry]] = []
        self._patient: OrderedDict[int, Entry] = OrderedDict()  # not urgent, longest wait first
        self.round = 0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    def key(self, entry: Entry) -> Key:
        """Smaller is served first."""
        request = entry.request
        size = entry.uncached if self._config.prefill_policy == "short-first" else 0
        if entry.urgent:
            return (request.priority, 0, 0, request.arrival, entry.number)
        return (request.priority, 1, size, request.arrival, entry.number)

    def restart(self, entry: Entry, now: float) -> None:
        """Its waiting counts from now: it came, or it got rows."""
        entry.urgent = False
        entry.round = self.round
        entry.since = now

    def starved(self, entry: Entry, now: float) -> bool:
        """Whether it has been passed by too often or for too long."""
        config = self._config
        return self.round - entry.round >= config.max_skips or now - entry.since >= config.max_wait

    def push(self, entry: Entry) -> None:
        """Puts a request in its place; `restart` and `urgent` have been seen to."""
        entry.key = self.key(entry)
        bisect.insort(self._order, (entry.key, entry))
        self.tokens += len(entry.request.tokens)
        if not entry.urgent:
            self._patient[entry.number] = entry

    def remove(self, entry: Entry) -> None:
        """Takes a request out."""
        at = bisect.bisect_left(self._order, (entry.key,))
        assert self._order[at][1] is entry, entry.request
        del self._order[at]
        self.tokens -= len(entry.request.tokens)
        self._patient.pop(entry.number, None)

    def promote(self, now: float) -> None:
        """Sends starved requests to the head."""
        while self._patient:
            entry = next(iter(self._patient.values()))
            if not self.starved(entry, now):
                return
            self.remove(entry)
            entry.urgent = True
            self.push(entry)

    @property
    def head(self) -> Entry | None:
        """The request to admit next."""
        return self._order[0][1] if self._order else None
