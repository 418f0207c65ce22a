"""Makes the plan of one step: who decodes, whose prompt rows run, who is admitted."""

from typing import NamedTuple

import numpy as np

from serve.drafting import DraftPolicy
from serve.plan import Chunk, StepPlan
from serve.queue import Entry
from serve.request import Request, Status
from serve.residents import Residents, Rows
from serve.scheduler_config import SchedulerConfig


class _Needs(NamedTuple):
    """Decoding rows, which of them can be launched, and the pages that each needs for that."""

    rows: Rows
    able: np.ndarray
    pages: np.ndarray


class Planner:
    """Turns the state of `residents` into the next step and marks it as launched there.

    Args:
        config: sizes and policy.
        residents: the requests.
        drafting: picks the drafts of a step; None is always `config.drafts`.
    """

    def __init__(self, config: SchedulerConfig, residents: Residents, drafting: DraftPolicy | None):
        self._config = config
        self._residents = residents
        self._table = residents.table
        self._drafting = drafting
        self._prefilled = False  # whether the last plan had prompt rows

    def plan(self, number: int, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to do before another result or request.

        Decoding rows get their pages before anybody is admitted. A request whose last prompt rows
        are in this step decodes from the next one on.
        """
        residents, chunks, admit = self._residents, [], []
        requests, slots, columns, most = self._no_rows()
        if self._config.mixed:
            needs = self._grow(now)
            self._fill(chunks, admit, now)
            requests, slots, columns, most = self._rows(needs)
        else:
            if not self._prefilled:
                self._fill(chunks, admit, now)
            if not chunks:
                requests, slots, columns, most = self._rows(self._grow(now))
            if self._prefilled and not requests:
                self._fill(chunks, admit, now)
        self._prefilled = bool(chunks)
        if not requests and not chunks:
            return None
        if residents.fresh:
            admit += [r for r in requests if r.slot in residents.fresh]
            residents.fresh.difference_update(slots.tolist())
        self._table.launched(slots)
        for chunk in chunks:
            columns = max(columns, self._launch(chunk))
        drafts = self._drafts(len(requests), most)
        return StepPlan(number, admit, requests, slots, drafts, chunks, columns)

    def _no_rows(self) -> tuple[list[Request], np.ndarray, int, int]:
        return [], np.empty(0, np.int32), 0, self._config.drafts

    def _grow(self, now: float) -> _Needs:
        """Gives the decoding rows the pages they need, as far as there are any."""
        rows = self._residents.rows()
        going, pages, held = self._table.wanted(rows.slots)
        short = going & (pages > held)
        self._residents.stalled = False
        if short.any():
            self._residents.grow(rows.slots[short], pages[short], now)
            able = going & (pages <= self._table.held[rows.slots])
        else:
            able = going
        return _Needs(rows, able, pages)

    def _rows(self, needs: _Needs) -> tuple[list[Request], np.ndarray, int, int]:
        """Rows that cannot have ended and have their pages; columns they touch; drafts."""
        rows, able, pages = needs
        if rows is not self._residents.rows():  # some gave way, or were admitted to decode at once
            rows = self._residents.rows()
            going, pages, held = self._table.wanted(rows.slots)
            able = going & (pages <= held)
        if not rows.requests:
            return self._no_rows()
        if able.all():
            return rows.requests, rows.slots, int(pages.max()), rows.drafts
        kept = np.flatnonzero(able)
        requests = [rows.requests[row] for row in kept.tolist()]
        return requests, rows.slots[kept], int(pages[kept].max(initial=0)), rows.drafts

    def _fill(self, chunks: list[Chunk], admit: list[Request], now: float) -> None:
        """Spends the step's prompt rows in the order of the queue, admitting on the way.

        The first request that cannot be admitted stops all admission, so that the small ones
        behind it do not take what it waits for.
        """
        config, residents, queue = self._config, self._residents, self._residents.queue
        if not residents.prefilling and not len(queue):
            return
        queue.promote(now)
        for entry in residents.prefilling.values():
            entry.urgent = queue.starved(entry, now)
            entry.key = queue.key(entry)
        under_way = sorted(residents.prefilling.values(), key=lambda e: e.key, reverse=True)
        budget, blocked, served = config.max_prefill_tokens, residents.stalled, []
        while budget > 0 and len(chunks) < config.max_chunks:
            head = None if blocked else queue.head
            entry = under_way[-1] if under_way else None
            if head is not None and (entry is None or head.key < entry.key):
                if not self._admit(head, now):
                    blocked = True
                    continue
                entry = head
                if entry.uncached == 0:
                    residents.fresh.add(entry.request.slot)
                    residents.decode(entry)
                    continue
                admit.append(entry.request)
            elif entry is not None:
                under_way.pop()
            else:
                break
            request = entry.request
            chunk = Chunk(request, request.cached, min(entry.uncached, budget, config.chunk))
            chunks.append(chunk)
            served.append(entry)
            budget -= chunk.length
        queue.round += bool(chunks)
        for entry in served:
            queue.restart(entry, now)

    def _admit(self, entry: Entry, now: float) -> bool:
        request, residents = entry.request, self._residents
        if not self._table.try_take(entry, len(request.tokens) - 1):
            return False
        residents.queue.remove(entry)
        residents.prefilling[request.slot] = entry
        request.status = Status.PREFILL
        residents.admitted(entry, now)
        return True

    def _launch(self, chunk: Chunk) -> int:
        """Counts the chunk's rows as cached; returns the columns that it touches."""
        request, config = chunk.request, self._config
        slot = request.slot
        self._table.holds[slot] += 1
        end = chunk.start + chunk.length
        request.cached = end
        entry = self._residents.prefilling[slot]
        entry.uncached -= chunk.length
        if chunk.last:
            self._residents.decode(entry)
            end += config.first_rows
        return min(config.pages(end), int(self._table.held[slot]))

    def _drafts(self, batch: int, most: int) -> int:
        if not batch or self._drafting is None:
            return min(self._config.drafts, most)
        return self._drafting.pick(batch, most)
