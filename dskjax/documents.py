"""Reads text: files and folders in, one `Document` after another out.

    .txt, .txt.xz      one document, or several, each ended by "\\x1e\\n" (ASCII record separator)
    .jsonl, .jsonl.xz  one a line: {"text"}, {"prompt", "completion"}, {"messages"} or
                       {"question", "thinking", "answer"}, each with a "kind" if it has one
    .parquet           one a row, with such columns (the extra `parquet`)
    a folder           every such file under it, in sorted order

Conversations are rendered through the checkpoint's chat template. Every complaint names the file,
the line, row or byte, and what was expected there.
"""

import dataclasses
import json
import lzma
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dskjax.extras import require
from dskjax.parquet import iter_rows
from dskjax.tokenizer import END_THINK, THINK, Tokenizer

SEPARATOR = b"\x1e\n"
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz", ".parquet")
FIELDS = frozenset("text prompt completion question thinking answer messages kind task".split())
"""What records are made of; other columns of a table are not read."""
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text that is one unit of attention.

    Attributes:
        text: never blank.
        source: where it came from, for messages.
        rendered: True if the text came out of a chat template, so that the special tokens spelled
            in it are meant; in any other text they are ordinary characters.
        kind: kind of text, where the file says so.
        prompt: characters in front that a conversation's last answer replies to; 0 in plain text.
    """

    text: str
    source: str
    rendered: bool = False
    kind: str | None = None
    prompt: int = 0


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files behind `paths`, folders walked in sorted order.

    Raises:
        FileNotFoundError, ValueError: there are none, or one has another ending or needs a package
            that is not installed.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
            if not found:
                raise ValueError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif not _is_text(path):
            raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise ValueError("no text: the list of files and folders is empty")
    for path in files:
        if form(path) == "parquet":  # says so before work begins on the files in front
            require("pyarrow", str(path))
    return files


def form(path: Path) -> Literal["text", "jsonl", "parquet"]:
    """What the file holds, by its name: documents as they are, or records."""
    if path.name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.name.endswith((".jsonl", ".jsonl.xz")) else "text"


def iter_documents(
    paths: Sequence[str | Path], *, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """Documents of `paths` in order; blank ones are left out.

    Args:
        paths: files and folders.
        tokenizer: whose chat template renders conversations; without it they are refused.

    Raises:
        FileNotFoundError, ValueError: naming file, place and what was expected; also if there is
            not a single document.
    """
    files = list_files(paths)
    empty = True
    for path in files:
        for document in iter_file(path, tokenizer=tokenizer):
            empty = False
            yield document
    if empty:
        raise ValueError(f"no text: all documents are blank in {', '.join(map(str, files))}")


def iter_file(
    path: Path, *, tokenizer: Tokenizer | None = None, on_read: Callable[[int], Any] | None = None
) -> Iterator[Document]:
    """Documents of one file; a file without any is not an error here.

    `on_read` is told, as the file is read, how many more of its bytes (on disk) have been.
    """
    if form(path) != "text":
        for number, row in iter_records(path, on_read=on_read):
            where = f"{path}:{number}"
            document = _from_record(row, where, tokenizer)
            _check_unicode(document.text, where)
            if document.text.strip():
                yield document
    else:
        for offset, raw in _iter_pieces(path, SEPARATOR, on_read):
            text = _utf8(raw, path, offset)
            if text.strip():
                yield Document(text, f"{path} byte {offset}")


def iter_records(
    path: Path, *, on_read: Callable[[int], Any] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, object) of a file of records; blank lines are skipped."""
    if form(path) == "parquet":
        yield from iter_rows(path, FIELDS, on_read=on_read)
        return
    for number, (offset, raw) in enumerate(_iter_pieces(path, b"\n", on_read), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(_utf8(raw, path, offset))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: expected a JSON object a line: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def render_conversation(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> tuple[str, str]:
    """A conversation as the model should have written it: the last answer keeps its thinking.

    That thinking is the message's `reasoning_content`, or what precedes `</think>` in its content.

    Returns:
        What the last answer replies to, as it is served, and that answer; the former is empty if
        the last message is not the assistant's.
    """
    if not messages or messages[-1].get("role") != "assistant":
        return "", tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    last = messages[-1]
    answer, thinking = last.get("content"), last.get("reasoning_content")
    if not isinstance(answer, str):
        raise ValueError(f"the last message's content must be text, found {answer!r}")
    if thinking is None and END_THINK in answer:
        thinking, answer = answer.split(END_THINK, 1)
        thinking = thinking.removeprefix(THINK)
    if len(messages) == 1:
        return "", tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    if thinking is None:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        served = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
        prompt = os.path.commonprefix([text, served])  # a template may ask for thinking there
        return prompt, text[len(prompt) :]
    prompt = tokenizer.apply_chat_template(messages[:-1], thinking=True)
    if not prompt.rstrip().endswith(THINK):  # the template leaves the tag to the model
        prompt += THINK
    return prompt, f"{thinking}{END_THINK}{answer}"


def _from_record(row: Mapping[str, Any], where: str, tokenizer: Tokenizer | None) -> Document:
    if "text" in row:
        return Document(text_field(row, "text", where), where, kind=_kind(row, where))
    if "completion" in row:
        prompt, completion = (text_field(row, name, where) for name in ("prompt", "completion"))
        return Document(prompt + completion, where, kind=_kind(row, where), prompt=len(prompt))
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f"{where}: messages must be a list of objects")
    elif "question" in row and "answer" in row:
        reply = {"role": "assistant", "content": text_field(row, "answer", where)}
        if row.get("thinking") is not None:
            reply["reasoning_content"] = text_field(row, "thinking", where)
        messages = [{"role": "user", "content": text_field(row, "question", where)}, reply]
    else:
        raise ValueError(
            f"{where}: expected the fields text, or prompt and completion, or question and answer "
            f"(with thinking), or messages; found {', '.join(sorted(row)) or 'none'}"
        )
    if tokenizer is None:
        raise ValueError(
            f"{where}: a conversation needs a tokenizer with a chat template to render it"
        )
    try:
        prompt, answer = render_conversation(messages, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Document(
        prompt + answer, where, rendered=True, kind=_kind(row, where), prompt=len(prompt)
    )


def _kind(row: Mapping[str, Any], where: str) -> str | None:
    return None if row.get("kind") is None else text_field(row, "kind", where)


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field of a record that must be there and hold text.

    Raises:
        ValueError: it is not; the message begins with `where`.
    """
    if name not in row:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{where}: expected a field named {name}; found {found}")
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: {name} must be text, found {type(row[name]).__name__}")
    return row[name]


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from error


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _iter_pieces(
    path: Path, separator: bytes, on_read: Callable[[int], Any] | None
) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) between separators, read in chunks; an empty last piece is left out."""
    keep = len(separator) - 1  # bytes at a chunk's end that may begin a separator
    held: list[bytes] = []  # parts of a piece that spans chunks
    offset, carry, told = 0, b"", 0
    try:
        with path.open("rb") as raw, lzma.open(raw) if path.suffix == ".xz" else raw as file:
            while chunk := file.read(_CHUNK):
                *pieces, rest = (carry + chunk).split(separator)
                for piece in pieces:
                    whole = b"".join([*held, piece])
                    held.clear()
                    yield offset, whole
                    offset += len(whole) + len(separator)
                cut = max(len(rest) - keep, 0)
                held.append(rest[:cut])
                carry = rest[cut:]
                if on_read is not None:
                    on_read(raw.tell() - told)
                    told = raw.tell()
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: damaged or truncated xz file: {error}") from error
    if last := b"".join([*held, carry]):
        yield offset, last


def _utf8(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason}); "
            "convert the file or leave it out"
        ) from error
