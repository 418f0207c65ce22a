"""Prompts from files: JSON lines, or text in documents.

.jsonl       one a line: {"prompt": text or ids}, {"messages": [...]} or {"text": ...}
any other    text; documents end with an ASCII record separator (\\x1e), or the file is one
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEPARATOR = "\x1e"
_FIELDS = ("prompt", "messages", "text")


def load_prompts(path: Path, *, chars: int) -> list[dict[str, Any]]:
    """Bodies of requests: each {"prompt": ...} or {"messages": [...]}.

    Args:
        path: see above.
        chars: most characters of a document; prompts and conversations are taken whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of these, or no prompt at all; names file and line.
    """
    found = []
    for body in _entries(path):
        if "text" in body:
            text = body["text"][:chars].strip()
            found += [{"prompt": text}] if text else []
        else:
            found.append(body)
    if not found:
        raise ValueError(f"{path}: no prompt in it")
    return found


def load_text(path: Path) -> str:
    """All documents of a file in a row, to cut prompts from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line without text, or nothing but blanks.
    """
    texts = []
    for body in _entries(path):
        value = body.get("text", body.get("prompt"))
        if not isinstance(value, str):
            raise ValueError(f"{path}: a text is needed to cut prompts from, not {list(body)}")
        texts.append(value)
    text = "\n\n".join(texts)
    if not text.strip():
        raise ValueError(f"{path}: no text in it")
    return text


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8 text") from error
    if path.suffix != ".jsonl":
        return [{"text": part.strip("\n")} for part in text.split(SEPARATOR) if part.strip()]
    lines = text.splitlines()
    return [_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
    if isinstance(value, Mapping):
        for field in _FIELDS:
            if field in value and _is_fit(field, value[field]):
                return {field: value[field]}
    raise ValueError(
        f'{path}, line {number}: expected {{"prompt": text or ids}}, {{"messages": [...]}} or '
        f'{{"text": ...}}, not {line[:80]}'
    )


def _is_fit(field: str, value: Any) -> bool:
    if field == "messages":
        return isinstance(value, list) and bool(value)
    if isinstance(value, str):
        return bool(value)
    ids = isinstance(value, list) and value and all(type(item) is int for item in value)
    return field == "prompt" and bool(ids)
