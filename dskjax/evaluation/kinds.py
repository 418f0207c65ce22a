"""Held-out documents in groups: by name, by index, or by what their records say."""

import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dskjax.documents import Document, iter_documents
from dskjax.tokenizer import Tokenizer


def documents_by_kind(
    paths: Sequence[str | Path], *, index: str | Path | None = None, tokenizer: Tokenizer
) -> dict[str, list[Document]]:
    """Held-out documents in groups.

    Args:
        paths: files or folders, or "KIND=PATH". Of a plain path the kind is the document's own
            (the field `kind` of a JSON line), else the path's name up to the first dot.
        index: JSON lines with `kind` and `bytes` for the documents of each plain path, in order, as
            in the corpus's `docs.jsonl.xz`; those whose `split` is another name are skipped.
        tokenizer: renders conversations.

    Raises:
        ValueError: the index does not fit a file; names file, place, expected and found.
    """
    kinds: dict[str, list[Document]] = {}
    for text in map(str, paths):
        kind, is_named, path = text.rpartition("=")
        name = Path(path).name.partition(".")[0]
        documents = list(iter_documents([path], tokenizer=tokenizer))
        if is_named or index is None:
            for document in documents:
                kinds.setdefault(kind or document.kind or name, []).append(document)
            continue
        rows = [row for row in _read_index(index) if row.get("split", name) == name]
        if len(rows) != len(documents):
            raise ValueError(
                f"{index}: has {len(rows)} documents of split {name!r}, but {path} has "
                f"{len(documents)}; give the index of this file, or KIND={path}"
            )
        for row, document in zip(rows, documents, strict=True):
            found = len(document.text.encode())
            if row["bytes"] != found:
                raise ValueError(
                    f"{document.source}: {index} says {row['bytes']} bytes, found {found}; "
                    f"give the index of this file, or KIND={path}"
                )
            kinds.setdefault(row["kind"], []).append(document)
    return dict(sorted(kinds.items()))


def _read_index(path: str | Path) -> Iterator[dict[str, Any]]:
    opened = lzma.open(path, "rt") if str(path).endswith(".xz") else open(path)
    with opened as file:
        yield from map(json.loads, file)
