"""Which engine takes a request. Pure and deterministic; ties go to the engine named first.

Policies for engines that decode:
- round-robin: the next one;
- request-count: fewest requests;
- kv-size: fewest cached tokens;
- remaining-slots: most requests that it could still take at a short horizon: what runs now and is
  expected to end by then, from the lengths of the answers so far, makes room.
A prefill goes to the engine with the fewest queued uncached tokens; each engine's own scheduler
then serves short prompts first.
"""

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

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
    """What is known of the answers' lengths, by traffic class: running mean and latest lengths.

    Args:
        initial: tokens, the mean before the first answer of any class.
        weight: of the newest answer in the mean.
        keep: latest lengths of a class.
    """

    def __init__(self, initial: float = 512.0, weight: float = 0.05, keep: int = 512):
        self._weight = weight
        self._keep = keep
        self._all = initial
        self._means: dict[int, float] = {}
        self._latest: dict[int, deque[int]] = {}
        self._sorted: dict[int, np.ndarray] = {}

    def observe(self, priority: int, tokens: int) -> None:
        """An answer ended."""
        old = self._means.get(priority, self._all)
        self._means[priority] = old + self._weight * (tokens - old)
        self._all += self._weight * (tokens - self._all)
        self._latest.setdefault(priority, deque(maxlen=self._keep)).append(tokens)
        self._sorted.pop(priority, None)

    def mean(self, priority: int) -> float:
        """Tokens, at least 1."""
        return max(1.0, self._means.get(priority, self._all))

    def ending(self, priority: int, generated: np.ndarray, tokens: float) -> np.ndarray:
        """Chance that answers which have so many tokens end within `tokens` more.

        From the latest lengths that are longer; with fewer than 8 of them as if every token might
        be the last, at the rate that gives the mean.

        Args:
            priority: traffic class.
            generated: [n], tokens so far.
            tokens: how many more.

        Returns:
            float64 [n].
        """
        lengths = self._sorted.get(priority)
        if lengths is None:
            lengths = self._sorted[priority] = np.sort(self._latest.get(priority, ()))
        longer = len(lengths) - np.searchsorted(lengths, generated, side="right")
        after = len(lengths) - np.searchsorted(lengths, generated + tokens, side="right")
        memoryless = 1 - math.exp(-tokens / self.mean(priority))
        return np.where(longer >= 8, 1 - after / np.maximum(longer, 1), memoryless)


def remaining_slots(
    view: EngineView, lengths: OutputLengths, *, horizon: float, mean_prompt: float, tpot: float
) -> float:
    """Requests that the engine could take within `horizon` seconds, beyond those it has.

    The smaller of free slots, and of free cache in units of a mean request, both with what is
    expected to end by then. Negative if the engine is overcommitted.

    A request that has passed the mean length is not expected to end at once: of long-tailed
    lengths, half of what runs has, and an engine full of the longest would look empty. So a
    request ends by the horizon with the chance that those before it did which came as far.

    Args:
        view: the engine.
        lengths: of the answers.
        horizon: seconds.
        mean_prompt: tokens.
        tpot: seconds a token, used where the engine has none yet.
    """
    load = view.load
    tokens = horizon / (load.tpot or tpot)
    ends, freed = 0.0, 0.0
    for priority in {request.priority for request in view.requests}:
        mine = [(r.prompt, r.generated) for r in view.requests if r.priority == priority]
        prompt, generated = np.array(mine).T
        chance = lengths.ending(priority, generated, tokens)
        ends += float(chance.sum())
        freed += float((chance * (prompt + generated)).sum())
    free = load.total_pages * load.page_size - view.kv_tokens
    by_slots = load.slots - len(view.requests) + ends
    by_cache = (free + freed) / (mean_prompt + lengths.mean(0))
    return min(by_slots, by_cache)


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

    def _cost(self, view: EngineView) -> tuple[float | int, ...]:
        if self.policy is Policy.REQUEST_COUNT:
            return (len(view.requests),)
        if self.policy is Policy.KV_SIZE:
            return (view.kv_tokens,)
        return (-self.remaining(view), view.kv_tokens)
