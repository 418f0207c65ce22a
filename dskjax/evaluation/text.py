"""Bits per byte of documents.

    bits per byte = -log2 P(all predicted tokens) / UTF-8 bytes that these tokens stand for

Predicted is every token of a document but the bos in front, once, in sliding windows (see
`dskjax.evaluation.windows`). The end of a document (eos) is not predicted and separators of a file
count nowhere, so of plain text each byte counts once and nothing else does. Special tokens inside a
rendered conversation count among the bits, not among the bytes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dskjax.config import ModelConfig
from dskjax.document_tokens import tokenise
from dskjax.documents import Document
from dskjax.evaluation.intervals import bootstrap
from dskjax.evaluation.logprobs import token_logprobs
from dskjax.evaluation.windows import batches, windows
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model thinks of some documents.

    Attributes:
        nats: float64 [documents], -log P of each one's predicted tokens.
        tokens: int64 [documents], how many these are.
        bytes: int64 [documents], UTF-8 bytes that they stand for.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Of all documents as one text: long ones count for more."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    @property
    def interval(self) -> list[float]:
        """95% interval of `bits_per_byte`, bootstrap over documents."""
        return bootstrap(self.nats / math.log(2), self.bytes)

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "ci95": self.interval,
            "nats_per_token": float(self.nats.sum() / self.tokens.sum()),
            "documents": len(self.nats),
            "bytes": int(self.bytes.sum()),
            "tokens": int(self.tokens.sum()),
        }


def joined(parts: Sequence[Scored]) -> Scored:
    """Several kinds of text as one."""
    names = [field.name for field in dataclasses.fields(Scored)]
    return Scored(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def score_text(
    params: Params,
    cfg: ModelConfig,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    context: int = 1024,
    stride: int = 512,
    batch_size: int = 8,
    impl: str = "auto",
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Scored:
    """Scores documents, each with a bos in front.

    Args:
        params: weights; their dtype is the compute dtype.
        cfg: the model.
        documents: at least one.
        tokenizer: of the model.
        context: most tokens a prediction sees, itself included.
        stride: tokens between the beginnings of two windows.
        batch_size: rows of `context` tokens that run at once.
        impl: implementation of every op.
        on_bytes: told after each batch how many more bytes are done, for a progress bar.

    Raises:
        ValueError: no documents, context or stride out of range, a tokenizer with ids that the
            model does not have, or one that does not keep the text.
    """
    if not documents:
        raise ValueError("no documents to score: give at least one")
    if context > cfg.max_position_embeddings:
        raise ValueError(f"{context=} is more than the model's {cfg.max_position_embeddings=}")
    ids, sizes = [], []
    lengths = tokenizer.token_lengths()
    for document, tokens, _ in tokenise(documents, tokenizer):
        ids.append(tokens[:-1].astype(np.int32))  # all but the eos
        sizes.append(int(lengths[ids[-1]].sum()))
        _check(document, ids[-1], sizes[-1], cfg)
    nats = np.zeros(len(ids))
    counts = np.zeros(len(ids), np.int64)
    pieces = windows(ids, context=context, stride=stride)
    for rows in batches(pieces, context=context, batch_size=batch_size):
        logp = _logprobs(params, rows.tokens, rows.segment_ids, rows.positions, cfg=cfg, impl=impl)
        owner = rows.documents[:, 1:]
        mine = owner >= 0
        spent = -np.asarray(logp, np.float64)[mine]
        nats += np.bincount(owner[mine], spent, minlength=len(ids))
        counts += np.bincount(owner[mine], minlength=len(ids))
        on_bytes(int(lengths[rows.tokens[:, 1:][mine]].sum()))
    assert counts.sum() == sum(map(len, ids)) - len(ids)
    return Scored(nats=nats, tokens=counts, bytes=np.array(sizes))


def _check(document: Document, ids: np.ndarray, size: int, cfg: ModelConfig) -> None:
    if ids.max() >= cfg.vocab_size:
        raise ValueError(
            f"{document.source}: token id {ids.max()} is outside 0..{cfg.vocab_size - 1} "
            "(vocab_size): the tokenizer belongs to another model"
        )
    if not document.rendered and size != len(document.text.encode()):
        raise ValueError(
            f"{document.source}: the tokenizer turns {len(document.text.encode())} bytes into "
            f"{size}; bits per byte need one that keeps the text"
        )


@functools.partial(jax.jit, static_argnames=("cfg", "impl"))
def _logprobs(
    params: Params, tokens: Array, segment_ids: Array, positions: Array, *, cfg: Any, impl: str
) -> Array:
    return token_logprobs(
        params, tokens, cfg=cfg, segment_ids=segment_ids, positions=positions, impl=impl
    )
