"""What an operator may set about the HTTP side."""

import dataclasses

MAX_STOP_STRINGS = 16  # what `serve.request.StopOptions` allows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """Limits and access of the routes.

    Attributes:
        api_keys: requests must carry one of these as `Authorization: Bearer KEY`; none: open to
            everybody who reaches the port.
        public_metrics: /metrics needs no key.
        max_body: bytes of a request's body.
        body_timeout: seconds in which a body must have arrived.
        max_n: most answers to one prompt.
        max_prompts: most prompts in one request.
        max_stop: most stop strings.
        default_max_tokens: cap on the new tokens of a request that names no number; None: what is
            left of the model's length.
        probe_timeout: seconds in which /health wants a token.
        probe_ttl: seconds for which /health repeats its last answer instead of generating.

    Raises:
        ValueError: a value is out of range.
    """

    api_keys: tuple[str, ...] = ()
    public_metrics: bool = False
    max_body: int = 1 << 20
    body_timeout: float = 10.0
    max_n: int = 16
    max_prompts: int = 64
    max_stop: int = MAX_STOP_STRINGS
    default_max_tokens: int | None = None
    probe_timeout: float = 10.0
    probe_ttl: float = 1.0

    def __post_init__(self):
        for key in self.api_keys:
            if not key or not key.isprintable() or key != key.strip():
                raise ValueError("an API key must be printable text without spaces around it")
        for name in ("max_body", "max_n", "max_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.max_stop <= MAX_STOP_STRINGS:
            raise ValueError(f"{self.max_stop=} must be 0 to {MAX_STOP_STRINGS}")
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise ValueError(f"{self.default_max_tokens=} must be at least 1, or None")
        for name in ("body_timeout", "probe_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive (seconds)")
        if not self.probe_ttl >= 0:
            raise ValueError(f"{self.probe_ttl=} must not be negative (seconds)")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What the process that listens does with connections, below the routes.

    Attributes:
        header_timeout: seconds in which a request's headers must have arrived, and in which the
            rest of a body that nobody waits for any more must have.
        write_timeout: seconds for which a client may leave its answer unread before it is cut off.
        keep_alive: seconds for which an idle connection is kept.
        max_header_bytes: size of a request's headers together.
        access_log: write a line per request.
        log_level: of uvicorn's loggers.

    Raises:
        ValueError: a value is out of range.
    """

    header_timeout: float = 10.0
    write_timeout: float = 60.0
    keep_alive: int = 30
    max_header_bytes: int = 32 << 10
    access_log: bool = False
    log_level: str = "info"

    def __post_init__(self):
        for name in ("header_timeout", "write_timeout", "keep_alive", "max_header_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
