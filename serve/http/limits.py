"""What stands before the routes: request ids, API keys, and bodies that are bounded and timely.

Pure ASGI: nothing of a body is read before the key is right, and a route sees a whole body or is
never called.
"""

import asyncio
import hmac
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.config import HttpConfig
from serve.http.errors import ApiError, invalid

MAX_ID = 128
"""Characters of a client's X-Request-Id."""
_OPEN_PATHS = frozenset({"/health", "/ready"})
_PREFIXES = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-"}


class Gate:
    """Middleware around the routes.

    It puts `request_id`, unique whatever the client sends, into the request's state, and the
    client's own id (or else that one) into every answer's X-Request-Id.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig):
        self._app = app
        self._config = config
        self._keys = [key.encode() for key in config.api_keys]
        self._open = _OPEN_PATHS | ({"/metrics"} if config.public_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = _PREFIXES.get(scope["path"], "req-") + secrets.token_hex(16)
        given = _header(scope, b"x-request-id")
        id_is_good = len(given) <= 1 and all(_is_id(value) for value in given)
        shown = given[0] if given and id_is_good else own.encode()
        state = scope.setdefault("state", {})
        state.update(request_id=own, shown_id=shown.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", shown)]
            await send(message)

        try:
            self._check_key(scope)
            if not id_is_good:
                raise invalid(
                    f"X-Request-Id must be 1 to {MAX_ID} printable ASCII characters without "
                    "spaces, once",
                    "X-Request-Id",
                )
            if scope["method"] == "POST":
                receive = await self._with_body(scope, receive)
        except _GoneError:
            return
        except ApiError as error:
            if _header(scope, b"expect"):  # the client may or may not send its body now
                error.headers["Connection"] = "close"
            await error.response()(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in self._open:
            return
        given = _header(scope, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        right = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(right):
            wrong = "is wrong" if given else "is missing"
            raise ApiError(
                401,
                f"the API key {wrong}: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body; the returned function gives it whole and then what follows."""
        limit = self._config.max_body
        for length in _header(scope, b"content-length"):
            if length.isdigit() and int(length[:20]) > limit:
                raise _too_large(limit)
        try:
            async with asyncio.timeout(self._config.body_timeout):
                body = await _read(receive, limit)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._config.body_timeout:g} seconds",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


class _GoneError(Exception):
    """The client left before its request was complete."""


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")


def _header(scope: Scope, name: bytes) -> Sequence[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _is_id(value: bytes) -> bool:
    return 0 < len(value) <= MAX_ID and all(0x21 <= byte <= 0x7E for byte in value)
