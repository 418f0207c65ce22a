"""The checksum of a part: what it is, and the wait until both sides have computed theirs. No JAX.

The source computes it on its device when it extracts the pages and sends it along as a scalar; the
target computes it again from its own pool after it has installed them; the two are compared on the
host when both are ready, so neither device waits.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

WEIGHT = 2654435761  # odd: multiplying by it permutes the 32-bit numbers
FOLD = 31


def checksum(leaves: Iterable[np.ndarray], pages: int | None = None) -> int:
    """The checksum of a part's arrays, in the order of its leaves; uint32.

    Each element's bits, as an unsigned number b (8-byte elements give their two halves), weigh in
    by their place i, counted in C order: sum of (b + 1) * ((i * WEIGHT) | 1) modulo 2**32. A leaf's
    sum is folded into the total as total * FOLD + sum. Any one changed element shows, as do swapped
    pages and lost layers.

    Args:
        leaves: arrays of 1-, 2-, 4- or 8-byte elements.
        pages: count only so many entries of axis 1, the pages of a padded part; None is all.
            Leaves with fewer than two axes are counted whole.
    """
    total = 0
    for leaf in leaves:
        leaf = np.ascontiguousarray(leaf)
        size = min(leaf.itemsize, 4)
        bits = leaf.reshape(-1).view(f"u{size}").astype(np.uint32)
        place = np.arange(bits.size, dtype=np.uint32)
        terms = (bits + np.uint32(1)) * ((place * np.uint32(WEIGHT)) | np.uint32(1))
        if pages is not None and leaf.ndim >= 2:
            terms = terms.reshape(leaf.shape[0], leaf.shape[1], -1)[:, :pages]
        total = (total * FOLD + int(terms.sum(dtype=np.uint32))) % 2**32
    return total


class Pending(NamedTuple):
    """A part whose two checksums are not both known yet."""

    transfer_id: str
    index: int
    expected: Any
    actual: Any


def _ready(value: Any) -> bool:
    return bool(getattr(value, "is_ready", lambda: True)())


class PendingChecks:
    """Parts that were installed and whose checksums are still being computed.

    Belongs to the target engine's thread.
    """

    def __init__(self):
        self._pending: list[Pending] = []

    def add(self, transfer_id: str, index: int, expected: Any, actual: Any) -> None:
        """Waits for two scalars: ints, or arrays with an `is_ready` method."""
        self._pending.append(Pending(transfer_id, index, expected, actual))

    def poll(self) -> list[tuple[str, int, bool]]:
        """(transfer id, part index, whether they agree) of each part with both ready, in order."""
        done: list[Pending] = []
        waiting: list[Pending] = []
        for one in self._pending:  # in one pass: copies of a part are equal and ready one by one
            (done if _ready(one.expected) and _ready(one.actual) else waiting).append(one)
        self._pending = waiting
        return [(p.transfer_id, p.index, int(p.expected) == int(p.actual)) for p in done]

    def __len__(self) -> int:
        return len(self._pending)
