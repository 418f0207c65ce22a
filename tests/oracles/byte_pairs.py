"""Byte-pair encoding by ranks, as tiktoken defines it, one join at a time."""

from collections.abc import Mapping


def encode(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of a piece: the piece itself if it is a token, else joined from its bytes.

    Of all neighbours that together are a token, those of the lowest rank are joined, the leftmost
    of several, until there are none.
    """
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        found = [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
            if left + right in ranks
        ]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
