"""Errors that every layer of the server may raise and HTTP translates."""


class OverloadedError(RuntimeError):
    """The queue is full; try again later (HTTP 429). `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(RuntimeError):
    """The server is starting, draining or has lost its engine (HTTP 503)."""
