"""Documents longer than a context, cut into overlapping windows and packed into rows.

A document's windows begin `stride` tokens apart and are `context` long (the last ones shorter), and
a window predicts only what no window before it did: so every token but a document's first is
predicted once, and from the second window on with at least `context - stride` tokens before it. A
stride of `context - 1` is the cheapest: windows that share one token.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class Window(NamedTuple):
    """A stretch of a document.

    Attributes:
        ids: [N] token ids.
        document: number of the document.
        fresh: how many of the last tokens are predicted here, and nowhere else.
    """

    ids: np.ndarray
    document: int
    fresh: int


class Rows(NamedTuple):
    """Rows of packed windows.

    Attributes:
        tokens: [B, S]; 0 where there is padding.
        segment_ids: [B, S]; 1, 2, ... per window in the row, 0 = padding.
        positions: [B, S]; from 0 in each window.
        documents: [B, S]; the document of a token that is predicted here, else -1.
    """

    tokens: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    documents: Int32[np.ndarray, "B S"]


def windows(documents: Iterable[np.ndarray], *, context: int, stride: int) -> Iterator[Window]:
    """Cuts documents into windows, in order.

    Raises:
        ValueError: context or stride out of range.
    """
    if context < 2:
        raise ValueError(f"{context=} must be at least 2: a window predicts no first token")
    if not 1 <= stride < context:
        raise ValueError(f"{stride=} must be 1..{context - 1}, below {context=}")
    for number, ids in enumerate(documents):
        done = 1  # nothing predicts the first token
        for start in range(0, len(ids), stride):
            stop = min(start + context, len(ids))
            yield Window(ids[start:stop], number, stop - done)
            done = stop
            if stop == len(ids):
                break


def pack(pieces: Iterable[Window], context: int) -> Iterator[list[Window]]:
    """Fills rows of `context` tokens with whole windows in order; what does not fit begins the next
    row.
    """
    row, used = [], 0
    for piece in pieces:
        if used + len(piece.ids) > context:
            yield row
            row, used = [], 0
        row.append(piece)
        used += len(piece.ids)
    if row:
        yield row


def batches(pieces: Iterable[Window], *, context: int, batch_size: int) -> Iterator[Rows]:
    """Packed windows as arrays [batch_size, context], the last rows padded."""
    for part in itertools.batched(pack(pieces, context), batch_size):
        out = Rows(*(np.zeros((batch_size, context), np.int32) for _ in range(4)))
        out.documents[:] = -1
        for row, placed in enumerate(part):
            at = 0
            for segment, piece in enumerate(placed, start=1):
                stop = at + len(piece.ids)
                cells = (row, slice(at, stop))
                out.tokens[cells] = piece.ids
                out.segment_ids[cells] = segment
                out.positions[cells] = np.arange(len(piece.ids))
                out.documents[row, stop - piece.fresh : stop] = piece.document
                at = stop
        yield out
