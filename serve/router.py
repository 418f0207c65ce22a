"""Which engine takes a request. Pure and deterministic; ties go to the engine named first.

Policies for engines that decode:
- round-robin: the next one;
- request-count: fewest requests;
- kv-size: fewest cached tokens;
- remaining-slots: most requests that it could still take at a short horizon, from the running mean
  of the answers' lengths: what runs now and is expected to end by then makes room.
A prefill goes to the engine with the fewest queued uncached tokens; each engine's own scheduler
then serves short prompts first.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serve.engine_api import EngineLoad


class Policy(enum.StrEnum):
    """How a decoding engine is chosen."""

    ROUND_ROBIN = "round-robin"
    REQUEST_COUNT = "request-count"
    KV_SIZE = "kv-size"
    REMAINING_SLOTS = "remaining-slots"


class Assigned(NamedTuple):
    """A request at an engine, as the coordinator's books have it.

    Attributes:
        prompt: tokens when it came.
        generated: new tokens since.
        priority: traffic class.
    """

    prompt: int
    generated: int
    priority: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class EngineView:
    """An engine that may be chosen: its own snapshot, and what the coordinator sent there.

    The books are ahead of the snapshot: a request sent a moment ago counts.
    """

    name: str
    load: EngineLoad
    requests: Sequence[Assigned]

    @property
    def kv_tokens(self) -> int:
        """Cached tokens of its requests."""
        return sum(request.prompt + request.generated for request in self.requests)


class OutputLengths:
    """Running mean of the answers' lengths, by traffic class.

    Args:
        initial: tokens, before the first answer of any class.
        weight: of the newest answer.
    """

    def __init__(self, initial: float = 512.0, weight: float = 0.05):
        self._weight = weight
        self._all = initial
        self._by_class: dict[int, float] = {}

    def observe(self, priority: int, tokens: int) -> None:
        """An answer ended."""
        old = self._by_class.get(priority, self._all)
        self._by_class[priority] = old + self._weight * (tokens - old)
        self._all += self._weight * (tokens - self._all)

    def mean(self, priority: int) -> float:
        """Tokens, at least 1."""
        return max(1.0, self._by_class.get(priority, self._all))


def remaining_slots(
    view: EngineView, lengths: OutputLengths, *, horizon: float, mean_prompt: float, tpot: float
) -> float:
    """Requests that the engine could take within `horizon` seconds, beyond those it has.

    A request is expected to be free after max(0, mean output - generated) * tpot seconds. The count
    is the smaller of slots and of cache in units of a mean request, a fraction where that is the
    cache; negative if the engine is overcommitted.

    Args:
        view: the engine.
        lengths: running means of the answers' lengths.
        horizon: seconds.
        mean_prompt: tokens.
        tpot: seconds a token, used where the engine has none yet.
    """
    load = view.load
    tpot = load.tpot or tpot
    finishes, freed = 0, 0
    for request in view.requests:
        left = max(0.0, lengths.mean(request.priority) - request.generated) * tpot
        if left <= horizon:
            finishes += 1
            freed += request.prompt + request.generated
    free = load.total_pages * load.page_size - view.kv_tokens
    by_slots = load.slots - len(view.requests) + finishes
    by_cache = (free + freed) / (mean_prompt + lengths.mean(0))
    return min(float(by_slots), by_cache)


class Router:
    """Chooses engines.

    Args:
        policy: for decoding.
        horizon: seconds, of remaining-slots.
        initial_output: tokens of an answer, before the first ended.
        initial_tpot: seconds a token, before an engine knows its own.
        weight: of the newest request in the running means.
    """

    def __init__(
        self,
        policy: Policy = Policy.REMAINING_SLOTS,
        *,
        horizon: float = 1.0,
        initial_output: float = 512.0,
        initial_tpot: float = 0.05,
        weight: float = 0.05,
    ):
        self.policy = policy
        self.lengths = OutputLengths(initial_output, weight)
        self._horizon = horizon
        self._tpot = initial_tpot
        self._weight = weight
        self._mean_prompt: float | None = None
        self._turn = 0

    def observe_prompt(self, tokens: int) -> None:
        """A request came."""
        old = float(tokens) if self._mean_prompt is None else self._mean_prompt
        self._mean_prompt = old + self._weight * (tokens - old)

    def remaining(self, view: EngineView) -> float:
        """See `remaining_slots`."""
        return remaining_slots(
            view,
            self.lengths,
            horizon=self._horizon,
            mean_prompt=self._mean_prompt or 1.0,
            tpot=self._tpot,
        )

    def pick(self, views: Sequence[EngineView]) -> str | None:
        """The engine for the next request, or None if there is none."""
        if not views:
            return None
        if self.policy is Policy.ROUND_ROBIN:
            self._turn += 1
            return views[(self._turn - 1) % len(views)].name
        return min(views, key=self._cost).name

    def pick_prefill(self, queued: Mapping[str, int]) -> str | None:
        """The engine with the fewest queued uncached tokens."""
        return min(queued, key=lambda name: queued[name], default=None)

    def _cost(self, view: EngineView) -> tuple[int, ...]:
        if self.policy is Policy.REQUEST_COUNT:
            return (len(view.requests),)
        if self.policy is Policy.KV_SIZE:
            return (view.kv_tokens,)
        remaining = self.remaining(view)
        # Engines that are as good as full, or without any bound, are told apart by what they hold.
        return (-math.floor(remaining), view.kv_tokens)
