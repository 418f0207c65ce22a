"""Slots and their pages: what the host knows of each sequence on the device, in arrays by slot.

A step is planned before the result of the one before it is known, so lengths here lag: a row that
`ahead` launched steps may still lengthen has at most (1 + K) * ahead tokens more than `length`.
"""

import heapq

import numpy as np

from serve.blocks import BlockManager
from serve.plan import StepResult
from serve.queue import Entry
from serve.scheduler_config import SchedulerConfig

_NEVER = np.iinfo(np.int64).max


class SlotTable:
    """State of every slot.

    Args:
        config: sizes.
        blocks: the pool.
        page_table: int32 [slots, columns] to use, a part of somebody's larger one; None makes one.

    Attributes:
        page_table: int32 [slots, columns]; -1 where a slot has no page.
        length: int64 [slots], tokens in the cache as of the last applied step; the prompt's, less
            its last token, from admission on.
        left: int64 [slots], steps' worth of tokens that may still come: what the request may emit
            as of the last applied step, 1 if it is decoded only once.
        limit: int64 [slots], most rows the sequence may ever have.
        held: int64 [slots], its pages.
        ahead: int64 [slots], launched unapplied steps that decode it.
        holds: int64 [slots], launched unapplied steps that touch it.
        seal_at: int64 [slots], length at which its next page is final.
        active: bool [slots], has, or will have, rows to come: neither empty, held nor leaving.
        drafted, accepted: int64 [slots], since admission.
        entries, pages: by slot; None and [] for an empty one.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, page_table: np.ndarray | None = None
    ):
        slots = config.num_slots
        self._config = config
        self._blocks = blocks
        self._delay = max(config.lookahead - 1, 0)
        self._free = list(range(slots))
        if page_table is None:
            page_table = np.empty((slots, config.max_columns), np.int32)
        page_table[:] = -1
        self.page_table = page_table
        # What every step changes is one array, so that a step changes it with one indexing.
        self._counters = np.zeros((slots, 8), np.int64)
        self.length, self.left, self.drafted, self.accepted = self._counters.T[:4]
        self.ahead, self.holds, self.limit, self.held = self._counters.T[4:]
        self.seal_at = np.full(slots, _NEVER)
        self.active = np.zeros(slots, np.bool_)
        self.entries: list[Entry | None] = [None] * slots
        self.pages: list[list[int]] = [[] for _ in range(slots)]

    def launched(self, slots: np.ndarray) -> None:
        """A step that touches `slots` has been launched."""
        self._counters[slots, 4:6] += 1

    def applied(self, slots: np.ndarray, cached: np.ndarray, result: StepResult) -> list[int]:
        """The result of the oldest such step is known; `cached` of its tokens are in the cache.

        Returns:
            Rows that have a page to publish.
        """
        counters = self._counters[slots]
        counters[:, 0] += cached
        counters[:, 1] -= result.count
        counters[:, 2] += result.offered
        counters[:, 3] += result.accepted
        counters[:, 4:6] -= 1
        self._counters[slots] = counters
        return np.flatnonzero(counters[:, 0] >= self.seal_at[slots]).tolist()

    @property
    def free(self) -> int:
        """Empty slots."""
        return len(self._free)

    def entry(self, slot: int) -> Entry:
        """The request in a slot that has one."""
        entry = self.entries[slot]
        assert entry is not None, slot
        return entry

    def try_take(self, entry: Entry, length: int) -> bool:
        """Gives a request a slot, the pages it shares, and pages for all up to its first decode.

        There must be room for that and, unless it would be alone, for the tokens that admission
        keeps in reserve for it and for every active request (after SGLang's allocatable formula,
        https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/disaggregation/decode.py).

        Args:
            entry: the request; gets `uncached`, its request gets slot, `cached` and `hit`.
            length: tokens in the cache when it starts decoding.

        Returns:
            False, and nothing happened, if there is no slot or no room.
        """
        if not self._free:
            return False
        config, blocks, request = self._config, self._blocks, entry.request
        limit = request.prompt_len + request.stop.max_tokens
        if request.prefill_only:
            limit = min(limit, length + config.first_rows)
        shared = [] if request.scored else blocks.match(request.tokens, chain=entry.chain)
        needed = config.pages(min(length + config.first_rows, limit)) - len(shared)
        room = blocks.available - blocks.idle(shared)
        if needed > room:
            return False
        if self.active.any():
            wished = config.pages(min(length + config.reserve_tokens, limit)) - len(shared)
            if max(needed, wished) + self._reserved() > room:
                return False
        slot = heapq.heappop(self._free)
        blocks.acquire(shared)
        self.entries[slot] = entry
        self.length[slot] = length
        self.left[slot] = request.remaining
        if request.prefill_only:
            self.left[slot] = min(request.remaining, 1)
        self.limit[slot] = limit
        self.active[slot] = True
        self.held[slot] = 0
        self._append(slot, shared)
        self.extend(slot, needed)
        self.seal_at[slot] = self._due(len(shared))
        hit = len(shared) * config.page_size
        entry.uncached = len(request.tokens) - 1 - hit
        entry.shared = len(shared)
        if not request.admissions:
            request.hit = hit
        request.admissions += 1
        request.slot, request.cached = slot, hit
        return True

    def _reserved(self) -> int:
        """Pages that active requests may want beyond those they have."""
        config, active = self._config, self.active
        rows = np.minimum(self.length[active] + config.reserve_tokens, self.limit[active])
        wanted = -(-rows // config.page_size) - self.held[active]
        return int(wanted.clip(0).sum())

    def extend(self, slot: int, count: int) -> None:
        """Gives a slot `count` new pages, which must be there."""
        self._append(slot, self._blocks.allocate(count))

    def _append(self, slot: int, pages: list[int]) -> None:
        held = len(self.pages[slot])
        self.page_table[slot, held : held + len(pages)] = pages
        self.pages[slot] += pages
        self.held[slot] = held + len(pages)

    def release(self, slot: int) -> None:
        """Empties a slot that no launched step touches; its pages go back."""
        assert not self.holds[slot], (slot, self.entries[slot])
        request = self.entry(slot).request
        pages = self.pages[slot]
        self.page_table[slot, : len(pages)] = -1
        self._blocks.free(pages)
        self.entries[slot], self.pages[slot] = None, []
        self.length[slot] = self.left[slot] = self.limit[slot] = self.held[slot] = 0
        self.seal_at[slot] = _NEVER
        self.active[slot] = False
        heapq.heappush(self._free, slot)
        request.slot, request.cached = -1, 0

    def settle(self, slot: int) -> None:
        """Writes what was counted by slot into the request."""
        request = self.entry(slot).request
        request.drafted += int(self.drafted[slot])
        request.accepted += int(self.accepted[slot])
        self.drafted[slot] = self.accepted[slot] = 0

    def wanted(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For a decode step of `slots`: which of them cannot have ended, the pages each needs, and
        those that it has.

        The step writes its 1 + K rows and up to K rows of drafts behind whatever it accepts, and
        begins after at most (1 + K) tokens of each launched step.
        """
        config = self._config
        length, left, _, _, ahead, _, limit, held = self._counters[slots].T
        rows = length + ((1 + config.drafts) * (ahead + 1) + config.drafts)
        rows = np.minimum(rows, limit)
        return ahead < left, (rows + (config.page_size - 1)) // config.page_size, held

    def seal(self, slot: int, length: int) -> None:
        """Publishes the pages that are final now that `length` tokens are in the cache.

        The rows of a page that ends at e are final when the MTP modules have seen the tokens up to
        e + lookahead - 1, the last of which may be the one that stands at position `length`.
        """
        entry, size = self.entry(slot), self._config.page_size
        due = int(self.seal_at[slot])
        if length < due:
            return
        first = (due - self._delay) // size - 1
        last = (length - self._delay) // size
        entry.chain.extend(entry.request.tokens, last)
        last = min(last, len(entry.chain.keys))
        for page in range(first, last):
            self._blocks.publish(self.pages[slot][page], entry.chain.keys[page])
        self.seal_at[slot] = self._due(last)

    def seal_no_more(self, slots: np.ndarray) -> None:
        """The pages that are not final yet never will be."""
        self.seal_at[slots] = _NEVER

    def _due(self, sealed: int) -> int:
        return (sealed + 1) * self._config.page_size + self._delay
