"""The backend of a server with several engines: a thread around `serve.lifecycle`.

Everything that happens, calls from outside, engines' events and hints of the transport, goes into
one queue and is handled there in order.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from serve.attempts import CoordinatorConfig, OnTransfer, Summary
from serve.backend import Sink
from serve.engine_api import EngineEvent, EngineHandle, Role
from serve.errors import OverloadedError, UnavailableError
from serve.lifecycle import Lifecycle
from serve.plan import TokenEvent
from serve.request import FinishReason, Request
from serve.router import Router
from serve.transfer.transport import KVTransport

log = logging.getLogger(__name__)

Command = Callable[[float], None]
"""What the thread is to do; takes the time."""


class Mailbox:
    """The coordinator's queue, which exists before the engines that post into it."""

    def __init__(self):
        self._queue: queue.SimpleQueue[Command | EngineEvent | None] = queue.SimpleQueue()

    def post(self, item: EngineEvent | Command | None) -> None:
        """Takes an event, or a command, or None for the end; from any thread, at once."""
        self._queue.put(item)

    def get(self, timeout: float) -> Command | EngineEvent | None:
        """The next one.

        Raises:
            queue.Empty: none came within `timeout` seconds.
        """
        return self._queue.get(timeout=timeout)


class Coordinator:
    """Several engines behind one queue; a `serve.backend.Backend`.

    Args:
        engines: all of role ifb, or prefill and decode ones.
        mailbox: where the engines post.
        transport: between them; None without prefill engines. Ended by `stop`.
        router: chooses engines; None is remaining-slots.
        config: limits.
        on_transfer: told of every transfer that ended.
        clock: seconds; the one that `Request.arrival` is read from.
        tick: seconds between two looks at deadlines.

    Raises:
        ValueError: see `Lifecycle`.
    """

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        mailbox: Mailbox,
        *,
        transport: KVTransport | None = None,
        router: Router | None = None,
        config: CoordinatorConfig | None = None,
        on_transfer: OnTransfer | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick: float = 0.02,
    ):
        self._clock = clock
        self._tick = tick
        self._config = config or CoordinatorConfig()
        self._engines = list(engines)
        self._transport = transport
        self._sink: Sink | None = None
        self._mailbox = mailbox
        self._lock = threading.Lock()
        self._posted: set[str] = set()  # submitted, not handled yet
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="serve-coordinator", daemon=True)
        self.lifecycle = Lifecycle(
            self._engines,
            transport,
            router or Router(),
            self._config,
            self._to_sink,
            on_transfer,
        )
        if transport is not None:
            transport.notify = self._on_transfer

    @property
    def ready(self) -> bool:
        """Every engine is warmed up and alive, and so are the transport and this thread."""
        engines = all(engine.ready for engine in self._engines)
        return self._able and engines and not self.lifecycle.books.dead

    @property
    def _able(self) -> bool:
        return self._thread.is_alive() and not self._failed and self.lifecycle.able

    @property
    def history(self) -> list[Summary]:
        """The latest requests that ended, oldest first."""
        return list(self.lifecycle.books.history)

    def engines(self) -> list[str]:
        """Names of the engines."""
        return [engine.name for engine in self._engines]

    def start(self, sink: Sink) -> None:
        """Starts the engines and the thread; `sink` takes the events of every request in order."""
        self._sink = sink
        self._thread.start()
        for engine in self._engines:
            engine.start()

    def stop(self) -> None:
        """Ends the thread, the engines and the transport; no event follows."""
        if self._thread.ident is not None:
            self._mailbox.post(None)
            self._thread.join()
        for engine in self._engines:
            engine.stop()
        if self._transport is not None:
            self._transport.shutdown()

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: no engine can serve it, or its id is in use.
            OverloadedError: the queue is full.
            UnavailableError: an engine that it needs is not ready.
        """
        if not self._able:
            raise UnavailableError("the engines are not ready")
        roles = (Role.PREFILL, Role.DECODE) if self.lifecycle.split else (Role.IFB,)
        for role in roles:
            self._validate(request, [engine for engine in self._engines if engine.role is role])
        room = self._config.max_queue + sum(
            engine.load().slots for engine in self._engines if engine.role is roles[-1]
        )
        with self._lock:
            known = len(self.lifecycle.books.records) + len(self._posted)
            if known >= room:
                raise OverloadedError(f"{known} requests are here already: try later")
            self._claim(request)
        self._mailbox.post(lambda now: self._submit(request, now))

    def submit_to(self, engine: str, request: Request) -> None:
        """Queues a request at one engine, whatever its role and the queue.

        Raises:
            KeyError: there is no such engine.
            ValueError: it cannot serve the request, or its id is in use.
            UnavailableError: that engine is not ready.
        """
        handle = self.lifecycle.books.engines[engine]
        dead = engine in self.lifecycle.books.dead
        if dead or self._failed or not (self._thread.is_alive() and handle.ready):
            raise UnavailableError(f"engine {engine} is not ready")
        handle.validate(request)
        with self._lock:
            self._claim(request)
        self._mailbox.post(lambda now: self._submit(request, now, engine))

    def abort(self, request_id: str) -> None:
        """Ends a request whose answer nobody wants, without an event."""
        self.finish(request_id, FinishReason.ABORT)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Ends a request whose answer is complete, without an event."""
        self._mailbox.post(lambda now: self.lifecycle.end(request_id, reason, now))

    def _validate(self, request: Request, engines: list[EngineHandle]) -> None:
        """One engine that can serve it is enough."""
        problem: ValueError | None = None
        for engine in engines:
            try:
                engine.validate(request)
                return
            except ValueError as error:
                problem = error
        assert problem is not None
        raise problem

    def _claim(self, request: Request) -> None:
        if request.id in self._posted or request.id in self.lifecycle.books.records:
            raise ValueError(f"request id {request.id!r} is in use: choose another one")
        self._posted.add(request.id)

    def _submit(self, request: Request, now: float, engine: str | None = None) -> None:
        if engine is None:
            self.lifecycle.submit(request, now)
        else:
            self.lifecycle.submit_to(engine, request, now)
        with self._lock:
            self._posted.discard(request.id)

    def _on_transfer(self, transfer_id: str) -> None:
        self._mailbox.post(lambda now: self.lifecycle.poll(transfer_id, now))

    def _to_sink(self, events: list[TokenEvent]) -> None:
        assert self._sink is not None
        self._sink(events)

    def _run(self) -> None:
        next_tick = self._clock()
        try:
            while True:
                now = self._clock()
                if now >= next_tick:
                    self.lifecycle.tick(now)
                    next_tick = now + self._tick
                try:
                    item = self._mailbox.get(max(0.0, next_tick - now))
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, EngineEvent):
                    self.lifecycle.handle(item, self._clock())
                else:
                    item(self._clock())
        except Exception as error:  # a bug: nothing may be decoded on; every client is told
            log.exception("the coordinator failed")
            self._failed = True
            self._fail_all(f"the coordinator failed: {error!r}")

    def _fail_all(self, message: str) -> None:
        for record in self.lifecycle.books.records.values():
            self._to_sink([TokenEvent(record.request, [], FinishReason.ERROR, message=message)])
