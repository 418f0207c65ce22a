"""A request's life across engines, as a state machine without threads or a clock of its own.

    submit -> reserve on D -> prefill on P, first token out -> transfer -> activate on D -> end

Rules:
- room on D comes first, so that no prefilled request can wait for room that others hold;
- a request is activated when every part is acknowledged with the right checksum and nothing is on
  the wire; in every other case it is tried again, from the tokens that the client has, or ends with
  an error;
- pages of either side are given back when the transport says that nobody reads or writes them;
- every wait has a deadline, and what events tell is also polled.
"""

import bisect
import itertools
import logging
from collections.abc import Callable, Sequence

from serve.admission import Admission, connect
from serve.attempts import (
    Attempt,
    Books,
    CoordinatorConfig,
    OnTransfer,
    Phase,
    Record,
    TransferEnd,
    TransferResult,
    copy_back,
    copy_request,
    why_late,
)
from serve.engine_api import (
    EngineEvent,
    EngineFailed,
    EngineHandle,
    EngineReady,
    Held,
    Installed,
    Refused,
    Reserved,
    Role,
    Tokens,
)
from serve.plan import TokenEvent
from serve.request import FinishReason, Request
from serve.router import Router
from serve.transfer.states import TransferState
from serve.transfer.transport import Endpoint, IncompatibleError, KVTransport, Progress, Ticket

log = logging.getLogger(__name__)


class Lifecycle:
    """All requests of a server.

    Args:
        engines: those that serve; either all of role ifb, or at least one of prefill and of decode.
        transport: between them; None without prefill engines.
        router: chooses engines.
        config: limits.
        sink: takes the events for clients, those of a request in order.
        on_transfer: told of every transfer that ended.

    Attributes:
        remaining: of each decoding engine, `Router.remaining` at most a second ago; replaced, never
            changed, so any thread may read it.

    Raises:
        ValueError: the roles do not make a server, or a name is used twice.
        IncompatibleError: a prefill and a decode engine hold their caches differently.
    """

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        transport: KVTransport | None,
        router: Router,
        config: CoordinatorConfig,
        sink: Callable[[list[TokenEvent]], None],
        on_transfer: OnTransfer | None = None,
    ):
        self.split = connect(engines, transport)
        self.books = Books({engine.name: engine for engine in engines})
        self.router = router
        self.config = config
        self.now = 0.0
        self.remaining: dict[str, float] = {}
        self._admission = Admission(self.books, router, config, self.split)
        self._maybe_transport = transport
        self._sink, self._on_transfer = sink, on_transfer or (lambda end: None)
        self._out: list[TokenEvent] = []
        self._order = itertools.count()
        self._heartbeat_at = self._measure_at = 0.0

    @property
    def transport(self) -> KVTransport:
        """The transport, where there are prefill engines."""
        assert self._maybe_transport is not None
        return self._maybe_transport

    @property
    def able(self) -> bool:
        """Whether engines of each needed role live, and the transport is healthy."""
        usable = self.books.usable
        if not self.split:
            return bool(usable(Role.IFB))
        return bool(usable(Role.PREFILL) and usable(Role.DECODE)) and self.transport.healthy

    @property
    def idle(self) -> bool:
        """Nothing is asked for, and everything was given back."""
        return not (self.books.records or self.books.attempts)

    def submit(self, request: Request, now: float) -> None:
        """Queues a request."""
        self.now = now
        record = Record(request, next(self._order), now + self.config.queue_timeout)
        self.books.records[request.id] = record
        self.router.observe_prompt(len(request.tokens))
        self._queue(record)
        self._start()
        self._flush()

    def submit_to(self, engine: str, request: Request, now: float) -> None:
        """Serves a request from prompt to end at one engine."""
        self.now = now
        record = Record(request, next(self._order), now, pinned=True)
        self.books.records[request.id] = record
        self._serve(record, engine)
        self._flush()

    def end(self, request_id: str, reason: FinishReason, now: float) -> None:
        """The client wants no more of a request; it gets no event."""
        self.now = now
        if (record := self.books.records.get(request_id)) is None:
            return
        attempt = record.attempt
        self._close(record, reason)
        if attempt is not None and record.phase is Phase.DECODE:
            self.books.stop_decoding(attempt, reason)
        elif attempt is not None:
            self._give_up(attempt, failed=False)
        self._start()
        self._flush()

    def handle(self, event: EngineEvent, now: float) -> None:
        """An engine says something. What an attempt that was given up gets to hear is ignored."""
        self.now = now
        match event:
            case Tokens():
                self._on_tokens(event)
            case Reserved():
                if attempt := self._waiting(event.request_id, Phase.RESERVING):
                    self._on_reserved(attempt, event)
            case Refused():
                if attempt := self._waiting(event.request_id, Phase.RESERVING):
                    self._on_refused(attempt, event)
            case Held():
                if attempt := self._waiting(event.request_id, Phase.PREFILL):
                    self._on_held(attempt, event)
            case Installed():
                self.transport.acknowledge(event.transfer_id, event.index, event.ok)
                self.poll(event.transfer_id, now)
            case EngineFailed():
                self._on_engine_failed(event)
            case EngineReady():
                self._on_engine_ready(event.engine)
        self._start()
        self._flush()

    def poll(self, transfer_id: str, now: float) -> None:
        """Looks at a transfer and does what follows."""
        self.now = now
        if (attempt := self.books.attempts.get(transfer_id)) is None or attempt.ticket is None:
            return
        progress = self.transport.poll(transfer_id)
        if attempt.closing:
            if self._quiet(progress):
                self._free(attempt)
        elif attempt.record.phase is Phase.DECODE:
            return
        elif progress.state is TransferState.FAILED:
            self._fail(attempt, f"the cache transfer failed: {progress.why}")
        elif self._complete(attempt, progress.state):
            self._activate(attempt)
        self._flush()

    def tick(self, now: float) -> None:
        """Deadlines, polls, heartbeats, and a fresh look at the queue. Call it often."""
        self.now = now
        for record in list(self.books.records.values()):
            if record.deadline <= now:
                self._on_late(record)
        for attempt in list(self.books.attempts.values()):
            if attempt.ticket and (attempt.closing or attempt.record.phase is not Phase.DECODE):
                self.poll(attempt.id, now)
        if now >= self._heartbeat_at and self.split:
            self._heartbeat_at = now + self.config.lease / 6
            live = (a for a in self.books.attempts.values() if a.ticket and not a.closing)
            self.transport.heartbeat([attempt.id for attempt in live])
        if now >= self._measure_at:
            self._measure_at = now + 1.0
            views = self.books.views(Role.IFB, Role.DECODE)
            self.remaining = {view.name: self.router.remaining(view) for view in views}
        self._start()
        self._flush()

    def _queue(self, record: Record) -> None:
        record.phase, record.attempt, record.deadline = Phase.QUEUED, None, record.queued_until
        bisect.insort(self.books.queue, record, key=lambda r: r.rank)

    def _start(self) -> None:
        """Starts requests in order; one that finds no room holds up those behind it."""
        queue = self.books.queue
        while queue and queue[0].retry_at <= self.now and self._start_one(queue[0]):
            queue.pop(0)

    def _start_one(self, record: Record) -> bool:
        if self.split and not self.transport.healthy:
            return False
        if (start := self._admission.choose(record)) is None:
            return False
        if not start.prefill:
            self._serve(record, start.engine)
            return True
        attempt = self.books.begin(record, start.engine, start.prefill)
        attempt.pending = attempt.prompt  # until D answers
        self._wait(record, Phase.RESERVING, self.config.reserve_timeout)
        self.books.engines[start.engine].reserve(attempt.copy)
        return True

    def _serve(self, record: Record, engine: str) -> None:
        """One engine does it all."""
        attempt = self.books.begin(record, engine)
        self._wait(record, Phase.DECODE, self.config.stall_timeout)
        self.books.engines[engine].submit(attempt.copy)

    def _wait(self, record: Record, phase: Phase, seconds: float) -> None:
        record.phase, record.deadline = phase, self.now + seconds

    def _waiting(self, attempt_id: str, phase: Phase) -> Attempt | None:
        attempt = self.books.attempts.get(attempt_id)
        if attempt is None or attempt.closing or attempt.record.phase is not phase:
            return None
        return attempt

    def _on_reserved(self, attempt: Attempt, event: Reserved) -> None:
        record = attempt.record
        if (ticket := self._admission.ticket(attempt, event, self.now)) is None:
            self._fail(attempt, "no prefill engine is left")
            return
        try:
            self.transport.open(ticket)
        except (IncompatibleError, KeyError) as error:  # an engine came back as another one
            self._fail(attempt, f"no transfer from {ticket.source} to {ticket.target}: {error}")
            return
        attempt.ticket, attempt.prefill = ticket, ticket.source
        attempt.pending = ticket.tokens - ticket.skip_tokens
        attempt.prefill_copy = copy_request(record.request, attempt.id, prefill_only=True)
        self._wait(record, Phase.PREFILL, self.config.prefill_timeout)
        self.books.engines[ticket.source].submit_prefill(attempt.prefill_copy, ticket)

    def _on_refused(self, attempt: Attempt, event: Refused) -> None:
        record = attempt.record
        del self.books.attempts[attempt.id]
        if event.permanent:
            self._error(record, event.why)
            return
        record.retry_at = self.now + self.config.refuse_backoff
        self._queue(record)

    def _on_held(self, attempt: Attempt, event: Held) -> None:
        record = attempt.record
        if event.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._fail(attempt, f"{event.engine} ended the prefill: {event.finish}")
            return
        attempt.tokens, attempt.pending = event.tokens, 0
        assert attempt.prefill_copy is not None
        copy_back(record.request, attempt.prefill_copy)
        record.request.tokens.extend(event.tokens)
        self._out.append(event.event(record.request))
        if event.finish is not None:
            self._close(record, event.finish)
            self._give_up(attempt, failed=False)
            return
        self._wait(record, Phase.TRANSFER, self.config.transfer_timeout)
        self.poll(attempt.id, self.now)

    def _complete(self, attempt: Attempt, state: TransferState) -> bool:
        """Whether the target may decode."""
        return state is TransferState.SUCCESS and attempt.record.phase is Phase.TRANSFER

    def _activate(self, attempt: Attempt) -> None:
        ticket, tokens = attempt.ticket, attempt.tokens
        assert ticket is not None and tokens is not None
        record = attempt.record
        record.tokens_transferred += ticket.tokens - ticket.skip_tokens
        self.books.engines[attempt.decode].activate(attempt.id, tokens)
        self.books.engines[attempt.prefill].release(attempt.id, failed=False)
        self._forget(ticket, "success")
        self._wait(record, Phase.DECODE, self.config.stall_timeout)

    def _on_tokens(self, event: Tokens) -> None:
        for news in event.events:
            attempt = self.books.attempts.get(news.request.id)
            if attempt is None or attempt.closing:
                continue
            record = attempt.record
            if record.phase is not Phase.DECODE:
                if news.finish is not None:
                    self._fail(attempt, f"the prefill failed: {news.message or news.finish}")
                continue
            copy_back(record.request, attempt.copy)
            record.request.tokens.extend(news.tokens)
            record.deadline = self.now + self.config.stall_timeout
            self._out.append(news._replace(request=record.request))
            if news.finish is not None:
                del self.books.attempts[attempt.id]
                self._close(record, news.finish, news.message)

    def _on_late(self, record: Record) -> None:
        if record.attempt is None:
            self._error(record, f"no engine had room within {self.config.queue_timeout} s")
        else:
            self._fail(record.attempt, why_late(record.attempt, self.config))

    def _on_engine_failed(self, event: EngineFailed) -> None:
        self.books.dead.add(event.engine)
        if self.split:
            self.transport.unregister(event.engine)
        for attempt in self.books.depending_on(event.engine):
            self._fail(attempt, f"engine {event.engine} failed: {event.why}")

    def _on_engine_ready(self, name: str) -> None:
        if name in self.books.dead:
            self.books.dead.discard(name)
            engine = self.books.engines[name]
            if self.split:
                self.transport.register(Endpoint(name, engine.compat), engine.deliver)

    def _fail(self, attempt: Attempt, why: str) -> None:
        """Gives an attempt up; its request is queued again, or ends with an error."""
        record = attempt.record
        log.warning("request %s, attempt %s: %s", record.request.id, attempt.id, why)
        decoding = record.phase is Phase.DECODE
        record.failures += 1
        if record.pinned or record.failures > self.config.retries:
            self._error(record, why)
        else:
            record.queued_until = self.now + self.config.queue_timeout
            self._queue(record)
        if decoding:
            self.books.stop_decoding(attempt, FinishReason.ABORT)
        else:
            self._give_up(attempt, failed=True)

    def _give_up(self, attempt: Attempt, failed: bool) -> None:
        """Ends an attempt that does not decode; its pages go back when nobody uses them."""
        attempt.closing, attempt.failed, attempt.pending = True, failed, 0
        if attempt.ticket is None or self.transport.cancel(attempt.id).may_free:
            self._free(attempt)

    def _quiet(self, progress: Progress) -> bool:
        """Whether nobody uses the pages of an attempt that was given up."""
        return progress.state.over and progress.quiescent

    def _free(self, attempt: Attempt) -> None:
        """Nobody reads or writes the pages of either side.

        An engine that failed is told too: by now it may have begun anew and taken the request.
        """
        del self.books.attempts[attempt.id]
        if attempt.ticket is not None:
            self._forget(attempt.ticket, "failed" if attempt.failed else "cancelled")
            self.books.engines[attempt.prefill].release(attempt.id, attempt.failed)
        self.books.engines[attempt.decode].release(attempt.id, True)

    def _forget(self, ticket: Ticket, result: TransferResult) -> None:
        """Tells of a transfer that is over, and closes it."""
        id, transport = ticket.transfer_id, self.transport
        self._on_transfer(TransferEnd(ticket, result, transport.poll(id), transport.timeline(id)))
        transport.close(id)

    def _error(self, record: Record, message: str) -> None:
        self._out.append(TokenEvent(record.request, [], FinishReason.ERROR, message=message))
        self._close(record, FinishReason.ERROR, message)

    def _close(self, record: Record, finish: FinishReason, message: str = "") -> None:
        if finish in (FinishReason.STOP, FinishReason.LENGTH) and record.request.emitted:
            self.router.lengths.observe(record.request.priority, record.request.emitted)
        self.books.close(record, finish, message)

    def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._sink(out)
