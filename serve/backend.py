"""The interface between the text side and the engines: requests in, batches of token events out."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from serve.plan import TokenEvent
from serve.request import FinishReason, Request

Sink = Callable[[list[TokenEvent]], None]
"""Takes what one step brought: events that carry the very `Request` that was submitted, whichever
engine works on it. Called from any engine's thread, never blocks, never raises."""


@runtime_checkable
class Backend(Protocol):
    """One engine, or several behind one queue. Every method may be called from any thread."""

    @property
    def ready(self) -> bool:
        """Every engine is warmed up and alive."""
        ...

    def start(self, sink: Sink) -> None:
        """Starts the engines; `sink` takes their events, those of a request in order."""
        ...

    def stop(self) -> None:
        """Ends the engines; what still runs in them gets no event any more."""
        ...

    def submit(self, request: Request) -> None:
        """Queues a request and returns at once.

        Raises:
            ValueError: no engine can serve it as it is.
            serve.errors.OverloadedError: the queue is full.
            serve.errors.UnavailableError: not ready.
        """
        ...

    def submit_to(self, engine: str, request: Request) -> None:
        """Queues a request of one token at one engine, whatever its role, queue full or not.

        Raises:
            serve.errors.UnavailableError: that engine is not ready.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request whose answer nobody wants. Unknown ids are none of its business."""
        ...

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Ends a request whose answer is complete, as `abort` does, but for this reason."""
        ...

    def engines(self) -> list[str]:
        """Names of the engines."""
        ...
