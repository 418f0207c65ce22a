"""The coordinator's books: requests, the attempts to serve them, and how long each may take."""

import dataclasses
import enum
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from serve.engine_api import EngineHandle, Role
from serve.request import FinishReason, Request
from serve.router import Assigned, EngineView
from serve.transfer.transport import Mode, Progress, Ticket, Timeline, attempt_id


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorConfig:
    """Limits. Times are in seconds; every wait has one.

    Attributes:
        max_queue: requests that wait beyond the slots of the engines; more are refused.
        retries: further attempts after the first that failed.
        layerwise_tokens: prompts with at least so many tokens to move go layer group by layer
            group; shorter ones whole.
        queue_timeout: from arrival to a slot.
        reserve_timeout: for the decoding engine's answer.
        prefill_timeout: from the order to the first token.
        transfer_timeout: from the first token to the last acknowledgement.
        stall_timeout: between two events of a decoding request.
        lease: for which a source holds pages after the last sign of life.
        refuse_backoff: before an engine that had no room is asked again.
        prefill_queue_tokens: uncached tokens at one prefill engine beyond which none is ordered
            there, so that no decode slot waits behind a long queue.
        local_prefill_tokens: prompts up to this may be prefilled by the engine that decodes ...
        local_prefill_queue: ... when every prefill engine has more tokens queued than this ...
        local_prefill_slots: ... and so many slots would still remain. 0 tokens turn it off.

    Raises:
        ValueError: a value is out of range.
    """

    max_queue: int = 1024
    retries: int = 2
    layerwise_tokens: int = 8192
    queue_timeout: float = 300.0
    reserve_timeout: float = 10.0
    prefill_timeout: float = 120.0
    transfer_timeout: float = 30.0
    stall_timeout: float = 300.0
    lease: float = 30.0
    refuse_backoff: float = 0.02
    prefill_queue_tokens: int = 131072
    local_prefill_tokens: int = 1024
    local_prefill_queue: int = 32768
    local_prefill_slots: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if isinstance(value, int) else 1e-6
            if value < least:
                raise ValueError(f"{field.name}={value} must be at least {least}")


class Phase(enum.Enum):
    """Where a request is in its life."""

    QUEUED = enum.auto()  # no attempt
    RESERVING = enum.auto()  # the decoding engine was asked for room
    PREFILL = enum.auto()  # a prefill engine was given the ticket
    TRANSFER = enum.auto()  # the first token is out; parts are missing
    DECODE = enum.auto()  # an engine has everything


_NEED_SOURCE = (Phase.PREFILL, Phase.TRANSFER)


class Summary(NamedTuple):
    """A request that ended.

    Attributes:
        request_id: the client's request.
        prefill, decode: engines of the last attempt; prefill is empty if one engine did both.
        attempts: reservations and submissions, refused ones included.
        failures: attempts that failed.
        tokens_transferred: rows that were moved and decoded on.
        mode: of the last transfer, or None.
        finish: why it ended.
        message: of an error.
    """

    request_id: str
    prefill: str
    decode: str
    attempts: int
    failures: int
    tokens_transferred: int
    mode: Mode | None
    finish: FinishReason
    message: str


TransferResult = Literal["success", "failed", "cancelled"]
"""Decoded on; given up, to be tried again or not; no longer wanted."""


class TransferEnd(NamedTuple):
    """A transfer that is over and about to be forgotten.

    Attributes:
        ticket: of the attempt.
        result: of the attempt, up to where the target decodes on.
        progress, timeline: what the transport has of it.
    """

    ticket: Ticket
    result: TransferResult
    progress: Progress
    timeline: Timeline


OnTransfer = Callable[[TransferEnd], None]
"""Told once of each transfer; called from the coordinator's thread, must not block."""


@dataclasses.dataclass(slots=True)
class Record:
    """A client's request from arrival to end.

    Attributes:
        request: the client's, whose tokens are those that the client was sent.
        order: of arrival.
        queued_until: when it has waited too long for room.
        deadline: of its phase.
        retry_at: it does not start before.
        phase: where it is.
        generation: of the current or last attempt.
        attempt: the current one, or None.
        failures: attempts that failed.
        tokens_transferred: see `Summary`.
        pinned: one engine only, without a second try.
    """

    request: Request
    order: int
    queued_until: float
    deadline: float = 0.0
    retry_at: float = 0.0
    phase: Phase = Phase.QUEUED
    generation: int = -1
    attempt: "Attempt | None" = None
    failures: int = 0
    tokens_transferred: int = 0
    pinned: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Who starts first."""
        return self.request.priority, self.order


@dataclasses.dataclass(slots=True)
class Attempt:
    """One try at a request: what was asked of which engine, until everything is given back.

    Attributes:
        id: under which engines and transport know it.
        record: the request, which may go on without this attempt.
        decode: engine that decodes, or does all.
        copy: the decoding engine's request.
        prompt: known tokens when it began.
        prefill: engine that prefills, or empty.
        prefill_copy: that engine's request.
        ticket: of the opened transfer.
        pending: uncached tokens the prefill engine has yet to compute for it.
        tokens: first new token, when it is known.
        closing: given up or complete, but something still writes to its pages.
        failed: whether what it received is in doubt.
    """

    id: str
    record: Record
    decode: str
    copy: Request
    prompt: int
    prefill: str = ""
    prefill_copy: Request | None = None
    ticket: Ticket | None = None
    pending: int = 0
    tokens: list[int] | None = None
    closing: bool = False
    failed: bool = True


def copy_request(
    request: Request, id: str, *, prefill_only: bool = False, scored: bool = True
) -> Request:
    """A request for one engine, which begins with all tokens that are known.

    Args:
        request: the client's.
        id: of the attempt.
        prefill_only: see `Request`.
        scored: the engine computes the prompt, and scores it if that is still to be done.
    """
    sampling = request.sampling
    if not (scored and request.scored):
        sampling = dataclasses.replace(sampling, prompt_logprobs=None)
    copy = Request(
        id,
        request.tokens[: request.prompt_len],
        stop=request.stop,
        sampling=sampling,
        accept=request.accept,
        drafts=request.drafts,
        priority=request.priority,
        arrival=request.arrival,
        salt=request.salt,
        thinking=request.thinking,
        prefill_only=prefill_only,
    )
    copy.tokens = list(request.tokens)
    copy.drafted, copy.accepted = request.drafted, request.accepted
    copy.first_token, copy.last_token = request.first_token, request.last_token
    return copy


def copy_back(request: Request, copy: Request) -> None:
    """What an engine noted of its copy and a client may ask for."""
    request.hit = max(request.hit, min(copy.hit, request.prompt_len))
    request.drafted, request.accepted = copy.drafted, copy.accepted
    request.first_scheduled = request.first_scheduled or copy.first_scheduled
    request.first_token = request.first_token or copy.first_token
    request.last_token = copy.last_token or request.last_token


def why_late(attempt: Attempt, config: CoordinatorConfig) -> str:
    """What a phase's deadline ended."""
    decode, prefill = attempt.decode, attempt.prefill
    return {
        Phase.RESERVING: f"{decode} did not answer within {config.reserve_timeout} s",
        Phase.PREFILL: f"{prefill} made no token within {config.prefill_timeout} s",
        Phase.TRANSFER: f"the cache did not arrive within {config.transfer_timeout} s",
        Phase.DECODE: f"{decode} made no token within {config.stall_timeout} s",
    }[attempt.record.phase]


class Books:
    """Requests, attempts and engines; one thread's."""

    def __init__(self, engines: Mapping[str, EngineHandle], history: int = 1024):
        self.engines = dict(engines)
        self.dead: set[str] = set()
        self.records: dict[str, Record] = {}
        self.queue: list[Record] = []  # by rank
        self.attempts: dict[str, Attempt] = {}
        self.history: deque[Summary] = deque(maxlen=history)

    def begin(self, record: Record, decode: str, prefill: str = "") -> Attempt:
        """A new attempt, with the next generation; `prefill` is empty if one engine does it all."""
        record.generation += 1
        request, known = record.request, len(record.request.tokens)
        id = attempt_id(request.id, record.generation)
        copy = copy_request(request, id, scored=not prefill)
        attempt = Attempt(id, record, decode, copy, known, prefill)
        record.attempt = self.attempts[id] = attempt
        return attempt

    def usable(self, *roles: Role) -> list[EngineHandle]:
        """Engines of these roles that live and are ready."""
        return [
            engine
            for engine in self.engines.values()
            if engine.role in roles and engine.name not in self.dead and engine.ready
        ]

    def views(self, *roles: Role) -> list[EngineView]:
        """What a router may choose from."""
        assigned: dict[str, list[Assigned]] = {}
        for attempt in self.attempts.values():
            done = len(attempt.record.request.tokens) - attempt.prompt
            entry = Assigned(attempt.prompt, done, attempt.copy.priority)
            assigned.setdefault(attempt.decode, []).append(entry)
        return [EngineView(e.name, e.load(), assigned.get(e.name, ())) for e in self.usable(*roles)]

    def queued_prefill(self) -> dict[str, int]:
        """Uncached tokens at each prefill engine."""
        queued = {engine.name: 0 for engine in self.usable(Role.PREFILL)}
        for attempt in self.attempts.values():
            if attempt.prefill in queued:
                queued[attempt.prefill] += attempt.pending
        return queued

    def stop_decoding(self, attempt: Attempt, reason: FinishReason) -> None:
        """Ends an attempt whose engine has everything, and needs nothing from others any more."""
        del self.attempts[attempt.id]
        engine = self.engines[attempt.decode]
        if reason is FinishReason.ABORT:
            engine.abort(attempt.id)
        else:
            engine.finish(attempt.id, reason)

    def depending_on(self, engine: str) -> list[Attempt]:
        """Attempts that cannot go on without an engine."""
        return [
            attempt
            for attempt in self.attempts.values()
            if not attempt.closing
            and (
                attempt.decode == engine
                or (attempt.prefill == engine and attempt.record.phase in _NEED_SOURCE)
            )
        ]

    def close(self, record: Record, finish: FinishReason, message: str) -> None:
        """Takes a request out and remembers how it went."""
        attempt = record.attempt
        ticket = attempt.ticket if attempt else None
        self.records.pop(record.request.id, None)
        if record in self.queue:
            self.queue.remove(record)
        self.history.append(
            Summary(
                request_id=record.request.id,
                prefill=attempt.prefill if attempt else "",
                decode=attempt.decode if attempt else "",
                attempts=record.generation + 1,
                failures=record.failures,
                tokens_transferred=record.tokens_transferred,
                mode=ticket.mode if ticket else None,
                finish=finish,
                message=message,
            )
        )
