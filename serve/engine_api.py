"""What the coordinator calls on an engine, and the events with which engines answer.

Contract of every handle:
- calls come from any thread, never block and take effect in the order in which they were made;
  `deliver`, called from a transport's thread, is in that order too: what was delivered before a
  `release` was called is installed or dropped before the pages are given back;
- answers are events, posted to the coordinator from the engine's thread;
- a request handed over belongs to the engine from then on; the coordinator makes a copy for each;
- an id that the engine does not know is ignored: it may have ended meanwhile; so is every call
  while the engine is down.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from serve.plan import TokenEvent, TokenLogprob
from serve.request import FinishReason, Request
from serve.transfer.transport import KVForm, Part, Ticket


class Role(enum.StrEnum):
    """What an engine is for."""

    IFB = "ifb"  # prefill and decode in flight together
    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineLoad:
    """A snapshot of an engine, a few steps old at most.

    Attributes:
        running: requests with a slot, reserved and held ones included.
        waiting: requests without.
        waiting_tokens: uncached tokens of prompts that wait or are under way.
        free_pages: pages nobody holds, findable ones included.
        total_pages, page_size, slots: of the engine.
        mean_output: running mean of the answers' lengths, 0 before the first.
        generated: new tokens so far of each decoding request.
        tpot: running mean of the seconds a request waits for one token, 0 before the first.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    free_pages: int
    total_pages: int
    page_size: int
    slots: int
    mean_output: float = 0.0
    generated: tuple[int, ...] = ()
    tpot: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Reserved:
    """The engine has a slot and pages for all known tokens of the request, and one more.

    Attributes:
        engine: which.
        request_id: the attempt's id.
        hit_tokens: tokens whose rows it has already, whole pages from the front.
        rank: which of its ranks has them; 0 where there are none.
    """

    engine: str
    request_id: str
    hit_tokens: int
    rank: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """The engine has no room for the request; `permanent` if it never will, whatever ends."""

    engine: str
    request_id: str
    why: str
    permanent: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A prefill is done and its first token known; the pages are kept until they are released.

    The parts may have been pushed before this event or still be under way. With a finish of ERROR
    or ABORT the prefill failed.

    Attributes:
        engine: which.
        request_id: the attempt's id.
        tokens: the first new token; none of a request that wants none.
        logprobs: of it, if asked for.
        finish: why the request ended with it, or None.
        stop_token: the id that ended it, if one did.
        prompt_logprobs: of the prompt, if asked for.
    """

    engine: str
    request_id: str
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    prompt_logprobs: list[TokenLogprob] | None = None

    def event(self, request: Request) -> TokenEvent:
        """What a client is told of it, whose request is `request`."""
        return TokenEvent(
            request,
            self.tokens,
            self.finish,
            self.logprobs,
            self.stop_token,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Installed:
    """A delivered part is in the engine's pool; `ok` if the checksums agree.

    One for each delivery, repeated ones included. A part that the engine dropped is not ok.
    """

    engine: str
    transfer_id: str
    index: int
    ok: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """What one step brought for requests that the engine decodes; ends with errors included."""

    engine: str
    events: list[TokenEvent]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine is gone with everything in it."""

    engine: str
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine is empty and works again, after it failed."""

    engine: str


EngineEvent = Reserved | Refused | Held | Installed | Tokens | EngineFailed | EngineReady
"""Whatever an engine may answer."""

Post = Callable[[EngineEvent], None]
"""Takes an event from any thread; never blocks, never raises."""


@runtime_checkable
class EngineHandle(Protocol):
    """An engine as the coordinator sees it; see the module's contract.

    Attributes:
        name: unique.
        role: what it is for.
        compat: the form of its cache.
    """

    name: str
    role: Role
    compat: KVForm

    @property
    def ready(self) -> bool:
        """Warmed up and alive."""
        ...

    def start(self) -> None:
        """Starts the engine, which posts events from now on. It is ready some time later."""
        ...

    def stop(self) -> None:
        """Ends the engine; no event follows."""
        ...

    def load(self) -> EngineLoad:
        """The latest snapshot."""
        ...

    def validate(self, request: Request) -> None:
        """Whether the engine, empty, could serve the request.

        Raises:
            ValueError: it could not: too long, too many pages, options it lacks.
        """
        ...

    def submit(self, request: Request) -> None:
        """Serves a request from prompt to end, whatever the role. Answers: Tokens."""
        ...

    def submit_prefill(self, request: Request, ticket: Ticket) -> None:
        """Prefills all known tokens, makes one new token and pushes the pages of the ticket; of a
        request that wants no token it pushes nothing.

        `request.prefill_only` is set and `request.id` is the ticket's transfer id. The pages stay
        until `release`. A push that is not taken is nothing to act on. Answers: Held, or Tokens
        with FinishReason.ERROR.
        """
        ...

    def reserve(self, request: Request) -> None:
        """Takes a slot and pages for a request whose pages another engine sends.

        Answers: Reserved or Refused, soon.
        """
        ...

    def deliver(self, ticket: Ticket, part: Part) -> None:
        """Takes a part of a reserved request; of any other it is dropped. Answers: Installed."""
        ...

    def activate(self, request_id: str, tokens: list[int]) -> None:
        """Every part of a reserved request is installed and right: decode from `tokens` on.

        `tokens` is the first new token, which has been told already. Answers: Tokens.
        """
        ...

    def release(self, request_id: str, failed: bool) -> None:
        """Ends a prefill_only or reserved request in any state and gives slot and pages back.

        No answer. Nobody writes or reads the pages any more but the engine's own steps, which it
        waits for.

        Args:
            request_id: the attempt's id.
            failed: what was received is not to be found by any other request.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a submitted or activated request. No answer; Tokens on their way may still come."""
        ...

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Ends a submitted or activated request whose answer is complete. No answer."""
        ...
