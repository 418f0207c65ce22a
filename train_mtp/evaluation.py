"""Bits per byte of held-out text, by kind of text.

    bits per byte = nats of all predicted tokens / ln 2 / UTF-8 bytes of the documents

Every token of a document but its bos is predicted exactly once; the closing eos counts among the
nats and not among the bytes; separators of the file count nowhere. A document longer than a row is
cut into windows of `seq_len` tokens that share one token, and context ends at the cut: the number
is that of a model with at most `seq_len` tokens of context, and with few at a window's start.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dskjax.document_tokens import tokenise
from dskjax.documents import Document
from dskjax.evaluation.windows import batches, windows
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer
from train_mtp.data import Batch
from train_mtp.loss import LossSums
from train_mtp.step import Recipe, eval_step, place_batch


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
    for document, tokens, _ in tokenise(documents, tokenizer):
        n_tokens += len(tokens)
        if ids and max_tokens is not None and n_tokens > max_tokens:
            break
        ids.append(tokens)
        n_bytes += len(document.text.encode())
    pieces = windows(ids, context=seq_len, stride=seq_len - 1)
    rows = batches(pieces, context=seq_len, batch_size=batch_size)
    packed = [Batch(row.tokens, row.segment_ids, row.positions) for row in rows]
    return HeldOut(packed, len(ids), n_bytes)


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
            sums = eval_step(params, place_batch(batch, recipe.sharding), recipe=recipe)
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
