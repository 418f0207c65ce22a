"""Documents to token ids, bos and eos exactly once around each; long texts in pieces."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dskjax.documents import Document
from dskjax.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20  # text per call of the tokenizer, which keeps some 100 bytes a token
_PIECE_CHARS = 1 << 20  # longer documents are encoded in pieces, for memory and for the other cores


class Tokenised(NamedTuple):
    """A document's ids, and the place among them where its answer begins (0 in plain text)."""

    document: Document
    ids: np.ndarray
    answer: int


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Tokenised]:
    """Each document with its ids, bos and eos exactly once among them.

    A conversation's prompt and answer are encoded apart, as they are when it is served.

    Raises:
        ValueError: the tokenizer has no bos token.
    """
    if tokenizer.bos_id is None:
        raise ValueError("documents need a bos token; name bos_token in tokenizer_config.json")
    bos, eos = tokenizer.bos_id, tokenizer.eos_ids
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for batch in _batches(documents):
        # Two passes: special tokens are parsed only in what a chat template wrote.
        pieces = [(n, *piece) for n, document in enumerate(batch) for piece in _parts(document)]
        ids: list[list[int]] = [[] for _ in batch]
        answers = [0] * len(batch)
        for rendered in (False, True):
            chosen = [piece for piece in pieces if batch[piece[0]].rendered == rendered]
            encoded = tokenizer.encode_batch([p for *_, p in chosen], parse_special=rendered)
            for (n, is_prompt, _), part in zip(chosen, encoded, strict=True):
                ids[n] += part
                answers[n] += len(part) if is_prompt else 0
        for document, body, answer in zip(batch, ids, answers, strict=True):
            front = [] if body[0] == bos else [bos]
            back = [] if body[-1] in eos else [eos[0]]
            whole = np.fromiter(itertools.chain(front, body, back), dtype)
            yield Tokenised(document, whole, answer + len(front) if document.prompt else 0)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(document: Document) -> Iterator[tuple[bool, str]]:
    """Pieces of the text in order, and whether each belongs to a conversation's prompt."""
    for is_prompt, part in (
        (True, document.text[: document.prompt]),
        (False, document.text[document.prompt :]),
    ):
        if part:
            yield from ((is_prompt, piece) for piece in _pieces(part))


def _pieces(text: str, limit: int = _PIECE_CHARS) -> list[str]:
    """Cuts a very long text where the pre-tokenizer cuts too: between a newline and a non-blank."""
    if len(text) <= limit:
        return [text]
    pieces, start = [], 0
    while len(text) - start > limit:
        cut = start + limit
        while cut < len(text) and not (text[cut - 1] == "\n" and not text[cut].isspace()):
            newline = text.find("\n", cut)
            cut = len(text) if newline < 0 else newline + 1
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]] if start < len(text) else pieces
