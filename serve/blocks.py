"""Pages of the cache: who holds them, and which of them a new request can take over.

A page is known by the hash of everything that went into it:

    key_j = H(key_{j-1} | tokens of page j | the next `lookahead` tokens),   key_{-1} = H(root)

The root stands for what changes the cache beside tokens: model, types, MTP scheme (`fingerprint`)
and the request's salt. The lookahead stands for the MTP modules: slot p of module k is computed
from token p + k, so the last slots of a page belong to it only if the next tokens agree too.

Pages that nobody holds stay findable until they are given out again, least recently freed first. A
request frees its pages from the last to the first, so that a chain loses its tail before its head.
Chained hashes and this order are those of vLLM's block pool
(https://github.com/vllm-project/vllm/blob/main/vllm/v1/core/block_pool.py); the lookahead is ours.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_DIGEST = 32  # bytes; a collision would hand out somebody else's cache


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


class Chain:
    """Keys of one sequence's pages from the front, each computed once; survives preemption.

    Made by `BlockManager.chain`. Tokens that a key was computed from must never change.

    Attributes:
        keys: one for each page whose tokens, lookahead included, have been known.
    """

    __slots__ = ("_lookahead", "_page_size", "_root", "keys")

    def __init__(self, root: bytes, page_size: int, lookahead: int):
        self._root = root
        self._page_size = page_size
        self._lookahead = lookahead
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], pages: int) -> None:
        """Computes the keys of the first `pages` pages of `tokens`, as far as they are known.

        A page whose tokens or lookahead lie beyond the end of `tokens` gets no key.
        """
        size, ahead = self._page_size, self._lookahead
        done, pages = len(self.keys), min(pages, (len(tokens) - ahead) // size)
        if pages <= done:
            return
        span = tokens[done * size : pages * size + ahead]
        data = struct.pack(f"<{len(span)}i", *span)
        key = self.keys[-1] if done else self._root
        for start in range(0, (pages - done) * size, size):
            key = _digest(key + data[4 * start : 4 * (start + size + ahead)])
            self.keys.append(key)


class BlockManager:
    """Gives out pages 0 .. num_pages - 1, counts who holds them and finds them again.

    Args:
        num_pages: pages of the pool.
        page_size: tokens a page holds.
        fingerprint: everything but tokens and salt that the content of a page depends on.
        lookahead: tokens after a page that its content depends on: the depth of the MTP chain, 1
            for a recycled module, 0 without speculation.
        tail: rows before a sequence's last token that must be computed again on a hit.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        fingerprint: bytes = b"",
        lookahead: int = 0,
        tail: int = 0,
    ):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"{num_pages=} and {page_size=} must be at least 1")
        if lookahead < 0 or tail < 0:
            raise ValueError(f"{lookahead=} and {tail=} must be 0 or more")
        self.num_pages = num_pages
        self.page_size = page_size
        self.lookahead = lookahead
        self.tail = tail
        self._fingerprint = fingerprint
        self._refs = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._cached = 0

    @property
    def available(self) -> int:
        """Pages that nobody holds, findable ones included."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody holds but a request could still take over."""
        return self._cached

    def chain(self, salt: str = "") -> Chain:
        """The empty chain of a sequence; equal chains need equal salts."""
        name = salt.encode()
        parts = (self._fingerprint, name)
        root = _digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        return Chain(root, self.page_size, self.lookahead)

    def match(
        self,
        tokens: Sequence[int],
        salt: str = "",
        limit: int | None = None,
        *,
        chain: Chain | None = None,
    ) -> list[int]:
        """The longest run of findable pages from the front of `tokens`; does not take them.

        Args:
            tokens: all known tokens; the hit leaves the last one and `tail` before it uncovered.
            salt: name space, used if no chain is given.
            limit: most tokens that may be taken.
            chain: the sequence's chain, extended as needed.
        """
        most = len(tokens) - 1 - self.tail
        if limit is not None:
            most = min(most, limit)
        pages = max(most, 0) // self.page_size
        chain = self.chain(salt) if chain is None else chain
        chain.extend(tokens, pages)
        found: list[int] = []
        for key in chain.keys[:pages]:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def acquire(self, pages: Iterable[int]) -> None:
        """Takes pages found by `match`, beside whoever holds them already."""
        for page in pages:
            if not self._refs[page]:
                del self._free[page]
                self._cached -= 1
            self._refs[page] += 1

    def idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds: what `acquire` would take from `available`."""
        return sum(not self._refs[page] for page in pages)

    def sole(self, pages: Iterable[int]) -> int:
        """How many of `pages` have one holder: what `free` would give back."""
        return sum(self._refs[page] == 1 for page in pages)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, those that nobody can find first; the others are forgotten.

        The caller has compared `count` with `available`.
        """
        assert count <= len(self._free), (count, len(self._free))
        taken: list[int] = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._refs[page] = 1
            if self._drop(page):
                self._cached -= 1
            taken.append(page)
        return taken

    def free(self, pages: Sequence[int]) -> None:
        """Gives pages back, in the order of the sequence; findable ones stay so."""
        for page in reversed(pages):
            self._refs[page] -= 1
            assert self._refs[page] >= 0, page
            if not self._refs[page]:
                self._free[page] = None
                if self._keys[page] is None:
                    self._free.move_to_end(page, last=False)
                else:
                    self._cached += 1

    def publish(self, page: int, key: bytes) -> bool:
        """Makes a held page findable. Its content is final and what `key` stands for.

        Returns:
            False if another page with this content is findable already; this one stays private.
        """
        assert self._refs[page], page
        if key in self._page_of:
            return self._page_of[key] == page
        assert self._keys[page] is None, page
        self._keys[page] = key
        self._page_of[key] = page
        return True

    def forget(self, pages: Iterable[int]) -> None:
        """Makes pages unfindable, for content that turned out to be wrong; holders keep them."""
        for page in pages:
            if self._drop(page) and not self._refs[page]:
                self._cached -= 1
                self._free.move_to_end(page, last=False)

    def _drop(self, page: int) -> bool:
        key = self._keys[page]
        if key is None:
            return False
        del self._page_of[key]
        self._keys[page] = None
        return True

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Asserts that the books balance; for tests.

        Args:
            holders: the pages of every sequence that holds some.
        """
        refs = [0] * self.num_pages
        for pages in holders:
            assert len(set(pages)) == len(pages), f"a page twice in one sequence: {pages}"
            for page in pages:
                refs[page] += 1
        assert refs == self._refs, (refs, self._refs)
        free = set(self._free)
        assert free == {page for page, count in enumerate(refs) if not count}
        hashed = {page for page, key in enumerate(self._keys) if key is not None}
        assert self._cached == len(free & hashed), (self._cached, free, hashed)
        assert {page: key for key, page in self._page_of.items()} == {
            page: self._keys[page] for page in hashed
        }
        order = [page in hashed for page in self._free]
        assert order == sorted(order), "a findable page would be given out before a private one"
