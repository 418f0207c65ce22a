"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from serve.api import OverloadedError, UnavailableError

_TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer that is an error object.

    Attributes:
        status: the HTTP status.
        message: what is wrong and what would be right.
        param: the field of the request that is wrong, if one is.
        code: a word for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The error object with its status and headers."""
        return json_response(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def internal(message: str = "internal error; the server's log says more") -> ApiError:
    """A fault of the server."""
    return ApiError(500, message, code="internal_error")


def unavailable(message: str) -> ApiError:
    """Starting, draining or broken."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "1"})


def from_service(error: ValueError | OverloadedError | UnavailableError) -> ApiError:
    """What a service raised before its first piece, as an answer."""
    if isinstance(error, OverloadedError):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return ApiError(429, str(error), code="overloaded", headers={"Retry-After": seconds})
    if isinstance(error, UnavailableError):
        return unavailable(str(error))
    return invalid(str(error))


def short(value: object, limit: int = 80) -> str:
    """`repr` cut to a length that an error message can carry."""
    text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else text[:limit] + "..."


# Characters at which some clients split lines; JSON leaves them as they are.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def dumps(value: Any) -> bytes:
    """JSON in UTF-8, one line for everybody. NaN and infinities raise: JSON has none."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(_LINE_ENDS)
    return text.encode("utf-8", "replace")


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer of JSON."""
    return Response(dumps(value), status, dict(headers or {}), media_type="application/json")
