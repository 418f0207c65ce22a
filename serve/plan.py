"""What passes between scheduler, runner and output side: plain data, no behaviour.

    Scheduler.schedule() -> StepPlan -> Runner.launch -> Pending -> Runner.fetch -> StepResult
    Scheduler.apply(plan, result) -> [TokenEvent] -> output side

The engine launches plan n + 1 before it fetches the result of plan n, so a plan is made from what
was known one step earlier; device state (last token, length, drafts) never passes through the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from serve.request import FinishReason, Request


class Chunk(NamedTuple):
    """Rows [start, start + length) of `request.tokens` that this step puts into the cache."""

    request: Request
    start: int
    length: int

    @property
    def last(self) -> bool:
        """Whether prefill is complete with this chunk: every known token but the last is cached."""
        return self.start + self.length >= len(self.request.tokens) - 1


@dataclasses.dataclass(slots=True)
class StepPlan:
    """One launch.

    Attributes:
        number: counts launches from 0.
        admit: requests whose slot's device state is to be written before the step (a request is
            admitted once, in the plan of its first chunk, or of its first decode if the whole
            prompt was in the prefix cache).
        requests: decoding requests; one row each.
        slots: int32 [n], their slots, in the same order.
        drafts: drafts verified and proposed in this step, at most the engine's.
        chunks: prompt rows of this step, at most one chunk a request.
        columns: pages of a sequence that any row of the step may touch, at most the page table's
            width.
    """

    number: int
    admit: list[Request]
    requests: list[Request]
    slots: np.ndarray
    drafts: int
    chunks: list[Chunk]
    columns: int

    @property
    def empty(self) -> bool:
        """Nothing to launch."""
        return not self.requests and not self.chunks


class StepResult(NamedTuple):
    """What a step did for `StepPlan.requests`, NumPy, in their order.

    Attributes:
        tokens: int32 [n, m + 1]; the first `count` of a row are new.
        count: int32 [n]; 0 for a row that had ended before.
        accepted: int32 [n], drafts the rule accepted.
        offered: int32 [n], drafts that were tested.
        finished: bool [n], the row ended on the device in this step: eos, stop token or max_tokens.
        logprobs: None if no row wanted them.
        prompt_logprobs: of the chunks of scored requests, those of the token after each row.
    """

    tokens: np.ndarray
    count: np.ndarray
    accepted: np.ndarray
    offered: np.ndarray
    finished: np.ndarray
    logprobs: "StepLogprobs | None" = None
    prompt_logprobs: "Sequence[tuple[Chunk, StepLogprobs]]" = ()


class StepLogprobs(NamedTuple):
    """float32 [n, m + 1] of the new tokens, and the best ids and their values, [n, m + 1, 20].

    Of a chunk: [length] and [length, 20].
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


class TokenLogprob(NamedTuple):
    """One token's log-probability and the best alternatives [(id, logprob)], best first."""

    logprob: float
    top: list[tuple[int, float]]


class TokenEvent(NamedTuple):
    """New tokens of a request, or its end, or both; in order for each request.

    Attributes:
        request: the request.
        tokens: new ids (an eos that ended it included); empty for an end without tokens.
        finish: None while it goes on.
        logprobs: one entry a token if the request asked for them.
        stop_token: the id that ended it, if one did.
        message: what went wrong, with FinishReason.ERROR.
        prompt_logprobs: with the first tokens of a scored request, or with its end without any: one
            entry a token of the prompt, from the second on.
    """

    request: Request
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    stop_token: int | None = None
    message: str = ""
    prompt_logprobs: list[TokenLogprob] | None = None


@runtime_checkable
class Runner(Protocol):
    """The device side of an engine, as the engine's thread sees it."""

    def launch(self, plan: StepPlan, page_table: np.ndarray) -> Any:
        """Dispatches a step and returns at once.

        Args:
            plan: the step; not empty.
            page_table: int32 [slots, width]; -1 where a slot has no page. Read before returning:
                the scheduler changes it afterwards.
        """
        ...

    def fetch(self, pending: Any) -> StepResult:
        """Waits for a launched step and returns what it did."""
        ...
