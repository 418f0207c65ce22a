"""Bits per byte of held-out text, by kind of text.

    bits per byte = nats of all predicted tokens / ln 2 / UTF-8 bytes of the documents

Every token of a document but its bos is predicted exactly once; the closing eos counts among the
nats and not among the bytes; separators of the file count nowhere. A document longer than a row is
cut into windows of `seq_len` tokens that share one token, and context ends at the cut: the number
is that of a model with at most `seq_len` tokens of context, and with few at a window's start.
"""

import dataclasses
import itertools
import json
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dskjax.params import Params
from dskjax.tokenizer import Tokenizer
from train_mtp.data import Batch
from train_mtp.documents import Document, iter_documents
from train_mtp.loss import LossSums
from train_mtp.step import Recipe, eval_step, place_batch
from train_mtp.token_store import tokenise


@dataclasses.dataclass(frozen=True)
class Score:
    """How well one kind of text is predicted.

    Attributes:
        bits_per_byte: of the trunk.
        loss: nats per predicted token, of the trunk.
        mtp_loss, mtp_top1, mtp_agree: per depth: nats per token, and how often the likeliest token
            is the text's and the trunk's own likeliest one (teacher-forced).
        documents, bytes, tokens: what was predicted; tokens without bos, with eos.
    """

    bits_per_byte: float
    loss: float
    mtp_loss: list[float]
    mtp_top1: list[float]
    mtp_agree: list[float]
    documents: int
    bytes: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Packed windows of one kind of text; made once, evaluated many times.

    Attributes:
        batches: all of one shape.
        documents, bytes: how many documents, and UTF-8 bytes of their texts.
    """

    batches: list[Batch]
    documents: int
    bytes: int


def documents_by_kind(
    paths: Sequence[str | Path], *, index: str | Path | None = None, tokenizer: Tokenizer
) -> dict[str, list[Document]]:
    """Held-out documents in groups.

    Args:
        paths: files or folders, or "KIND=PATH"; else the kind is the name up to the first dot.
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
            kinds.setdefault(kind or name, []).extend(documents)
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


def hold_out(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> HeldOut:
    """Tokenises and packs documents; stops before the one (not the first) to pass `max_tokens`."""
    ids, n_bytes, n_tokens = [], 0, 0
    for document, tokens in tokenise(documents, tokenizer):
        n_tokens += len(tokens)
        if ids and max_tokens is not None and n_tokens > max_tokens:
            break
        ids.append(tokens)
        n_bytes += len(document.text.encode())
    batches = list(_batches(pack(windows(ids, seq_len), seq_len), batch_size, seq_len))
    return HeldOut(batches, len(ids), n_bytes)


def windows(documents: Iterable[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Cuts documents into pieces of at most `seq_len` tokens, each beginning with the last token of
    the piece before: so the labels inside the pieces are all tokens but the first, once each."""
    if seq_len < 2:
        raise ValueError(f"{seq_len=} must be at least 2: a window predicts no first token")
    for ids in documents:
        for start in range(0, max(len(ids) - 1, 1), seq_len - 1):
            yield ids[start : start + seq_len]


def pack(pieces: Iterable[np.ndarray], seq_len: int) -> Iterator[list[np.ndarray]]:
    """Fills rows with whole pieces in order; what does not fit begins the next row."""
    row, used = [], 0
    for piece in pieces:
        if used + len(piece) > seq_len:
            yield row
            row, used = [], 0
        row.append(piece)
        used += len(piece)
    if row:
        yield row


def _batches(rows: Iterable[list[np.ndarray]], batch_size: int, seq_len: int) -> Iterator[Batch]:
    for part in itertools.batched(rows, batch_size):
        batch = Batch(*(np.zeros((batch_size, seq_len), np.int32) for _ in range(3)))
        for row, pieces in enumerate(part):
            at = 0
            for segment, piece in enumerate(pieces, start=1):
                cells = (row, slice(at, at + len(piece)))
                batch.tokens[cells] = piece
                batch.segment_ids[cells] = segment
                batch.positions[cells] = np.arange(len(piece))
                at += len(piece)
        yield batch


def evaluate(
    params: Params,
    kinds: Mapping[str, HeldOut],
    recipe: Recipe,
    *,
    on_batch: Callable[[], Any] = lambda: None,
) -> dict[str, Score]:
    """Scores each kind of text, and "all" of them together if there are several.

    Args:
        params: weights in any float dtype; computed with in the recipe's precision.
        kinds: what to predict.
        recipe: the model and how to compute; its optimizer is not used.
        on_batch: called after each batch, for a progress bar.
    """
    totals: dict[str, LossSums] = {}
    for kind, held_out in kinds.items():
        total = None
        for batch in held_out.batches:
            sums = eval_step(params, place_batch(batch, recipe), recipe=recipe)
            sums = jax.tree.map(_widen, jax.device_get(sums))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            on_batch()
        if total is not None:
            totals[kind] = total
    scores = {kind: _score(total, [kinds[kind]]) for kind, total in totals.items()}
    if len(totals) > 1:
        everything = jax.tree.map(lambda *leaves: sum(leaves), *totals.values())
        scores["all"] = _score(everything, list(kinds.values()))
    return scores


def _widen(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def _score(sums: LossSums, parts: Sequence[HeldOut]) -> Score:
    tokens = np.maximum(np.asarray(sums.tokens), 1)
    n_bytes = sum(part.bytes for part in parts)
    loss = np.asarray(sums.nats) / tokens
    return Score(
        bits_per_byte=float(sums.nats[0]) / math.log(2) / n_bytes,
        loss=float(loss[0]),
        mtp_loss=loss[1:].tolist(),
        mtp_top1=(np.asarray(sums.top1) / tokens)[1:].tolist(),
        mtp_agree=(np.asarray(sums.agree) / tokens)[1:].tolist(),
        documents=sum(part.documents for part in parts),
        bytes=n_bytes,
        tokens=int(sums.tokens[0]),
    )
