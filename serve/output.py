"""The output thread: takes the engines' events, makes text of them and hands it to event loops.

An engine puts one list a step into the queue and goes on; an event loop is woken once for all of
its answers that a step moved. So the interpreter lock changes hands a few times a step, not a few
times a token.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from serve.api import Output
from serve.backend import Backend
from serve.errors import UnavailableError
from serve.metrics import Metrics
from serve.plan import TokenEvent
from serve.request import FinishReason, Request

log = logging.getLogger(__name__)

Callback = Callable[[Output], None]
"""Takes the pieces of one answer, on its subscriber's event loop."""


@runtime_checkable
class Answer(Protocol):
    """Makes pieces of events; `serve.text.AnswerText` is one."""

    def push(self, event: TokenEvent) -> Output | None:
        """The next piece, or None if there is nothing to tell."""
        ...

    def end(self, reason: FinishReason, message: str) -> Output:
        """A last piece that no event asked for."""
        ...


@dataclasses.dataclass(slots=True)
class _Subscription:
    request: Request
    answer: Answer
    loop: asyncio.AbstractEventLoop
    callback: Callback
    measured: bool
    last: float | None = None  # when its last tokens were handed on


Deliveries = dict[asyncio.AbstractEventLoop, list[tuple[_Subscription, Output]]]


class OutputThread:
    """A thread between engines and event loops.

    What goes wrong with one answer ends that answer, with FinishReason.ERROR, and no other.

    Args:
        backend: told when a stop string ended an answer, or an error did.
        metrics: takes the times of answers, if given.
        clock: the one that `Request.arrival` is read from.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._backend = backend
        self._metrics = metrics
        self._clock = clock
        self._queue: queue.SimpleQueue[list[TokenEvent] | None] = queue.SimpleQueue()
        self._subscriptions: dict[str, _Subscription] = {}
        self._lock = threading.Lock()  # of the subscriptions and of `_stopped`
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="serve-output", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Handles what was pushed before, ends every answer that is left, and ends the thread.

        Raises:
            TimeoutError: the thread is stuck.
        """
        with self._lock:
            self._stopped = True
        self._queue.put(None)
        if self._thread.ident is None:  # never started
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the output thread did not end within {timeout} s")

    def push(self, events: list[TokenEvent]) -> None:
        """Takes what one step brought; from any thread, at once."""
        self._queue.put(events)

    def add(
        self,
        request: Request,
        answer: Answer,
        callback: Callback,
        *,
        loop: asyncio.AbstractEventLoop,
        measured: bool = True,
    ) -> None:
        """Subscribes to a request, before it is submitted. The last piece ends the subscription.

        Args:
            request: the request.
            answer: makes its pieces; from here on it belongs to the output thread.
            callback: called on `loop` with each piece.
            loop: the event loop.
            measured: count it in the metrics.

        Raises:
            ValueError: the id is taken.
            UnavailableError: the thread has been stopped.
        """
        with self._lock:
            if self._stopped:
                raise UnavailableError("the server is stopping")
            if request.id in self._subscriptions:
                raise ValueError(f"request id {request.id!r} is in use: choose another one")
            self._subscriptions[request.id] = _Subscription(
                request, answer, loop, callback, measured
            )

    def remove(self, request_id: str, *, counted: bool = True) -> bool:
        """Ends a subscription early, as an abort; whether there still was one.

        Pieces that are already on their way to the loop are still delivered. With `counted` false,
        the metrics do not hear of it: the request was refused and never ran.
        """
        subscription = self._pop(request_id)
        if subscription is not None and counted:
            self._measure_end(subscription, FinishReason.ABORT, self._clock())
        return subscription is not None

    def __len__(self) -> int:
        """Subscriptions."""
        return len(self._subscriptions)

    def _pop(self, request_id: str) -> _Subscription | None:
        with self._lock:
            return self._subscriptions.pop(request_id, None)

    def _run(self) -> None:
        while (events := self._queue.get()) is not None:
            self._handle(events)
        with self._lock:
            left, self._subscriptions = self._subscriptions, {}
        deliveries: Deliveries = {}
        for subscription in left.values():
            piece = subscription.answer.end(FinishReason.ABORT, "the server has stopped")
            deliveries.setdefault(subscription.loop, []).append((subscription, piece))
        self._deliver(deliveries)

    def _handle(self, events: list[TokenEvent]) -> None:
        now = self._clock()
        deliveries: Deliveries = {}
        gaps: dict[float, int] = {}  # most answers of a step wait equally long: observed together
        tokens = 0
        for event in events:
            subscription = self._subscriptions.get(event.request.id)
            # By identity: an id may be used again while events of its former owner are on the way.
            if subscription is None or subscription.request is not event.request:
                continue  # it has ended here, and the engine did not know yet
            try:
                piece = subscription.answer.push(event)
            except Exception as error:
                log.exception("request %s: its text cannot be made", event.request.id)
                self._tell(self._backend.abort, event.request.id)
                piece = subscription.answer.end(FinishReason.ERROR, str(error))
            if piece is None:
                continue
            if subscription.measured:
                tokens += len(piece.token_ids)
                self._measure(subscription, piece, now, gaps)
            if piece.finish is not None:
                if piece.finish is FinishReason.STOP and event.finish is None:
                    self._tell(self._backend.finish, event.request.id, FinishReason.STOP)
                if self._pop(event.request.id) is not None:
                    self._measure_end(subscription, piece.finish, now)
            deliveries.setdefault(subscription.loop, []).append((subscription, piece))
        if self._metrics is not None and tokens:
            self._metrics.generated(tokens)
            for seconds, times in gaps.items():
                self._metrics.between_tokens(seconds, times)
        self._deliver(deliveries)

    def _deliver(self, deliveries: Deliveries) -> None:
        for loop, pieces in deliveries.items():
            try:
                loop.call_soon_threadsafe(_call, pieces)
            except RuntimeError:  # the loop is closed: nobody waits for these answers
                log.warning("an event loop closed with %d answers under way", len(pieces))
                for subscription, _ in pieces:
                    if self.remove(subscription.request.id):
                        self._tell(self._backend.abort, subscription.request.id)

    def _tell(self, method: Callable[..., None], *args: object) -> None:
        """Calls a backend that may be broken without breaking this thread."""
        try:
            method(*args)
        except Exception:
            log.exception("the backend failed in %s%r", method.__name__, args)

    def _measure(
        self, subscription: _Subscription, piece: Output, now: float, gaps: dict[float, int]
    ) -> None:
        count = len(piece.token_ids)
        if self._metrics is None or not count:
            return
        if subscription.last is None:
            request = subscription.request
            self._metrics.first_token(now - request.arrival, request.prompt_len)
        else:
            seconds = (now - subscription.last) / count
            gaps[seconds] = gaps.get(seconds, 0) + count
        subscription.last = now

    def _measure_end(self, subscription: _Subscription, reason: FinishReason, now: float) -> None:
        if self._metrics is not None and subscription.measured:
            self._metrics.finished(subscription.request, reason, now)


def _call(pieces: list[tuple[_Subscription, Output]]) -> None:
    for subscription, piece in pieces:
        try:
            subscription.callback(piece)
        except Exception:
            log.exception("request %s: its subscriber failed", subscription.request.id)
