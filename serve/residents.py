"""Which request is where, who gives way when pages run out, and when slots come free."""

from typing import NamedTuple

import numpy as np

from serve.blocks import BlockManager
from serve.queue import Entry, WaitingQueue
from serve.request import Request, Status
from serve.scheduler_config import SchedulerConfig
from serve.slots import SlotTable

_MEAN_WEIGHT = 0.05  # of the newest answer in the mean output length


class Rows(NamedTuple):
    """Decoding requests, int32 [n] slots in their order, and the most drafts any of them allows.

    Shared between plans while nothing changes, so never written to.
    """

    requests: list[Request]
    slots: np.ndarray
    drafts: int


class Residents:
    """Every request that has not ended, and those that ended while a step was under way.

    Attributes:
        entries: by id; not those that ended.
        queue: requests without a slot.
        prefilling, decoding, parked: by slot; parked ones are RECEIVING or HELD.
        leaving: by slot; ended or preempted, waiting for the last launched step that touches them.
        fresh: slots that no plan has admitted yet.
        stalled: a decoding request waits for pages, so that nobody else may take any.
        preemptions: requests that lost their pages to others.
        hit_tokens, queried_tokens: prompt tokens found in the prefix cache, and looked for, at the
            first admission of each request.
        mean_output: tokens of an answer, running mean over those that ended; 0 before the first.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, page_table: np.ndarray | None = None
    ):
        self._config = config
        self._blocks = blocks
        self.table = SlotTable(config, blocks, page_table)
        self.queue = WaitingQueue(config)
        self.entries: dict[str, Entry] = {}
        self.prefilling: dict[int, Entry] = {}
        self.decoding: dict[int, Entry] = {}
        self.parked: dict[int, Entry] = {}
        self.leaving: dict[int, Entry] = {}
        self.fresh: set[int] = set()
        self.stalled = False
        self.preemptions = 0
        self.hit_tokens = self.queried_tokens = 0
        self.mean_output = 0.0
        self._ended = 0
        self._rows: Rows | None = None

    def rows(self) -> Rows:
        """The decoding requests, longest there first."""
        if self._rows is None:
            requests = [entry.request for entry in self.decoding.values()]
            most = self._config.drafts
            wishes = [most if r.drafts is None else min(r.drafts, most) for r in requests]
            slots = np.fromiter(self.decoding, np.int32, len(requests))
            self._rows = Rows(requests, slots, max(wishes, default=most))
        return self._rows

    def decode(self, entry: Entry) -> None:
        """The request's rows are in the cache, or in a launched step; it decodes from here on."""
        slot = entry.request.slot
        self.prefilling.pop(slot, None)
        self.parked.pop(slot, None)
        self.decoding[slot] = entry
        self._rows = None
        entry.request.status = Status.RUNNING

    def admitted(self, entry: Entry, now: float) -> None:
        """Notes that the request has just got its slot."""
        request = entry.request
        if request.admissions == 1:
            request.first_scheduled = now
            if not request.scored:
                self.hit_tokens += request.hit
                self.queried_tokens += len(request.tokens)

    def count_output(self, request: Request) -> None:
        """Lets an answer that came to its end count for the mean output length, if it has any."""
        if not request.emitted:
            return
        self._ended += 1
        weight = max(_MEAN_WEIGHT, 1 / self._ended)
        self.mean_output += weight * (request.emitted - self.mean_output)

    def park(self, entry: Entry, status: Status) -> None:
        """Keeps slot and pages of a request that no step touches any more, or not yet."""
        slot = entry.request.slot
        if self.decoding.pop(slot, None) is not None:
            self._rows = None
        self.table.active[slot] = status is Status.RECEIVING
        self.parked[slot] = entry
        entry.request.status = status

    def end(self, entry: Entry) -> None:
        """The request is over, wherever it was."""
        request = entry.request
        del self.entries[request.id]
        request.status = Status.FINISHED
        if request.slot < 0:
            self.queue.remove(entry)
        elif request.slot in self.leaving:
            entry.requeue = False
        else:
            self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        slot = entry.request.slot
        for place in (self.prefilling, self.decoding, self.parked):
            place.pop(slot, None)
        self.fresh.discard(slot)
        self._rows = None
        self.table.settle(slot)
        self.table.active[slot] = False
        self.leaving[slot] = entry

    def collect(self) -> None:
        """Gives back the slots of those that left and that no launched step touches.

        A preempted request then waits again, at the head, since its tokens are all known now.
        """
        if not self.leaving:
            return
        for slot in [slot for slot in self.leaving if not self.table.holds[slot]]:
            entry = self.leaving.pop(slot)
            self.table.settle(slot)
            self.table.release(slot)
            if entry.requeue:
                entry.requeue = False
                entry.uncached = len(entry.request.tokens) - 1
                self.queue.push(entry)

    def grow(self, slots: np.ndarray, pages: np.ndarray, now: float) -> None:
        """Gives decoding rows the pages they need, the first in rank first.

        When there are none, the last in rank of all that decode or prefill starts over later:
        another one, or the row itself. A row whose pages are still held by somebody that leaves
        stays out of this step, and nobody behind it gets any meanwhile. The first in rank never
        gives way, so something always ends.

        Args:
            slots: [n], rows that have too few.
            pages: [n], how many each should have.
            now: seconds.
        """
        blocks, table = self._blocks, self.table
        wants = zip(slots.tolist(), pages.tolist(), strict=True)
        needy = [(table.entry(slot), want) for slot, want in wants]
        needy.sort(key=lambda pair: pair[0].rank)
        coming = sum(blocks.sole(table.pages[slot]) for slot in self.leaving)
        promised = 0
        for entry, want in needy:
            slot = entry.request.slot
            if slot not in self.decoding:
                continue  # gave way to one before it
            extra = want - len(table.pages[slot])
            while blocks.available + coming < promised + extra:
                candidates = self._candidates()
                if candidates == [entry]:
                    break  # the rest is parked, or about to end, and will come free by itself
                victim = max(candidates, key=lambda other: other.rank)
                gain = blocks.sole(table.pages[victim.request.slot])
                before = blocks.available
                self._preempt(victim, now)
                if blocks.available == before:
                    coming += gain
                if victim is entry:
                    break
            if slot not in self.decoding:
                continue
            if not promised and blocks.available >= extra:
                table.extend(slot, extra)
            else:
                promised += extra
        self.stalled = promised > 0

    def _candidates(self) -> list[Entry]:
        """Who can give way: those that do not end with a step that is launched already."""
        table = self.table
        going = table.ahead < table.left
        decoding = [entry for slot, entry in self.decoding.items() if going[slot]]
        return [*decoding, *self.prefilling.values()]

    def _preempt(self, entry: Entry, now: float) -> None:
        self.preemptions += 1
        self.queue.restart(entry, now)
        entry.urgent = entry.requeue = True
        entry.request.status = Status.WAITING
        self._leave(entry)
        self.collect()
