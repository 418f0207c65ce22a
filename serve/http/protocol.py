"""Uvicorn's HTTP/1.1 connections with deadlines for clients that stall."""

from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(header_timeout: float, write_timeout: float) -> type[H11Protocol]:
    """A protocol class that cuts off who does not send or does not read.

    Args:
        header_timeout: seconds from the first moment a request is expected (a new connection, or
            the first byte on a kept one) to its last header, and for the rest of a body whose
            request is answered already.
        write_timeout: seconds for which the transport may refuse more of an answer.
    """

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._reading = _Deadline(self.loop, header_timeout, transport.abort)
            self._writing = _Deadline(self.loop, write_timeout, transport.abort)
            self._reading.start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._reading.stop()
            self._writing.stop()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self._awaits_rest():
                self._reading.start()
            else:
                self._reading.stop()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._writing.stop()

        def _awaits_rest(self) -> bool:
            """Part of a request is here, and nobody waits for the rest.

            While nothing comes after an answer, uvicorn's keep-alive timer runs instead.
            """
            theirs = self.conn.their_state
            if theirs is h11.IDLE:
                return bool(self.conn.trailing_data[0])
            answered = self.cycle is not None and self.cycle.response_complete
            return theirs is h11.SEND_BODY and answered

    return TimedProtocol


class _Deadline:
    """Calls `cut` once the time is up that began with the first `start` since a `stop`."""

    def __init__(self, loop: Any, seconds: float, cut: Callable[[], None]):
        self._loop = loop
        self._seconds = seconds
        self._cut = cut
        self._timer: Any = None  # an event loop's own kind of handle

    def start(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._cut)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
