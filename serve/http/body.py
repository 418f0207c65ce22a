"""JSON as it may come from anybody: strict where Python's parser is generous."""

import json
import math
from typing import Any

from serve.http.errors import ApiError, invalid, short

MAX_DEPTH = 32
"""Most levels of lists and objects in each other."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Refused: what is not UTF-8, a key given twice, NaN, infinities and numbers that become one,
    integers beyond 64 bits, half of a surrogate pair, deep nesting, and anything but an object.

    Raises:
        ApiError: 400 that says what is wrong.
    """
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise invalid(
            f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}",
            code="invalid_json",
        ) from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short(twice)} is given twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {short(text)} is too large")
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"the integer {short(text)} does not fit 64 bits")
    return value


def _check(value: Any) -> None:
    """Depth and surrogates, level by level: recursion would be the thing to protect from."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            _check_text(item if isinstance(item, dict) else ())
            _check_text(child for child in children if isinstance(child, str))
            below += [child for child in children if isinstance(child, dict | list)]
        if not below:
            return
        level = below
    raise _too_deep()


def _check_text(texts: Any) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise invalid(
                    "the body has half of a surrogate pair (\\ud800 to \\udfff)",
                    code="invalid_json",
                ) from None


def _too_deep() -> ApiError:
    return invalid(f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
