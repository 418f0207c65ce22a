"""Decides what every step does: who decodes, whose prompt rows run, who waits, who gives way.

The loop of an engine, one launch ahead of the results:

    plan = scheduler.schedule(now)            plan n + 1, from what result n - 1 told
    pending = runner.launch(plan, scheduler.page_table)
    events = scheduler.apply(plan n, runner.fetch(pending n), now)

Device rows stop by themselves, so a row that ended in step n may still stand in plan n + 1, where
its count is 0. A slot and its pages are given back only when the last launched step that touches
them has been applied: until then the device may write there.

The scheduler keeps no clock, starts no thread and draws no random numbers.
"""

from collections.abc import Sequence

import numpy as np

from serve.blocks import BlockManager
from serve.drafting import DraftPolicy
from serve.errors import OverloadedError
from serve.plan import StepPlan, StepResult, TokenEvent
from serve.planner import Planner
from serve.queue import Entry
from serve.request import FinishReason, Request, Status
from serve.residents import Residents
from serve.results import Results
from serve.scheduler_config import SchedulerConfig, SchedulerStats

MAX_LAUNCHED = 2
"""Most launched steps without an applied result: the one that runs and the one behind it."""
_MAX_REFUSED = 256  # refused reservations whose hash chains are kept for the next try


class Scheduler:
    """Requests in, plans out, results in, events out. One thread, and nobody else uses `blocks`.

    Args:
        config: sizes and policy.
        blocks: the pool.
        eos_ids: ids that end a request unless it ignores them.
        drafting: picks the drafts of a step; None is always `config.drafts`.
        page_table: see `serve.slots.SlotTable`.

    Raises:
        ValueError: `blocks` and `config` disagree.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        *,
        eos_ids: tuple[int, ...] = (),
        drafting: DraftPolicy | None = None,
        page_table: np.ndarray | None = None,
    ):
        for name in ("num_pages", "page_size", "lookahead", "tail"):
            ours, theirs = getattr(config, name), getattr(blocks, name)
            if ours != theirs:
                raise ValueError(f"{name} is {ours} for the scheduler and {theirs} for its blocks")
        if drafting is not None and drafting.ladder[-1] > config.drafts:
            raise ValueError(f"{drafting.ladder=} goes beyond {config.drafts=}")
        self.config = config
        self.blocks = blocks
        self._residents = Residents(config, blocks, page_table)
        self._drafting = drafting
        self._planner = Planner(config, self._residents, drafting)
        self._results = Results(config, self._residents, eos_ids)
        self._table = self._residents.table
        self._queue = self._residents.queue
        self._refused: dict[str, Entry] = {}
        self._arrived = self._launched = self._applied = 0

    # ---- what an engine reads

    @property
    def page_table(self) -> np.ndarray:
        """int32 [num_slots, max_columns], -1 where there is no page; changes with every call."""
        return self._table.page_table

    @property
    def requests(self) -> list[Request]:
        """Every request that has not ended."""
        return [entry.request for entry in self._residents.entries.values()]

    @property
    def idle(self) -> bool:
        """Nothing waits, runs, is held, is under way or waits for its slot to be given back."""
        residents = self._residents
        under_way = self._launched - self._applied
        return not (residents.entries or residents.leaving or under_way)

    def find(self, request_id: str) -> Request | None:
        """The request of that id, if it has not ended."""
        entry = self._residents.entries.get(request_id)
        return None if entry is None else entry.request

    def rank_of(self, request_id: str) -> int | None:
        """0 for a request that has not ended, as of a single rank."""
        return None if self.find(request_id) is None else 0

    def pages(self, request_id: str) -> list[int]:
        """Pages of a request that has a slot, from its first token on; for a transfer.

        Raises:
            KeyError: there is no such request.
        """
        slot = self._residents.entries[request_id].request.slot
        return list(self._table.pages[slot]) if slot >= 0 else []

    def stats(self) -> SchedulerStats:
        """A snapshot for metrics and for whoever spreads requests over engines."""
        residents, queue = self._residents, self._queue
        parked = [entry.request.status for entry in residents.parked.values()]
        preempted = [e.request for e in residents.leaving.values() if e.requeue]
        return SchedulerStats(
            waiting=len(queue) + len(preempted),
            prefilling=len(residents.prefilling),
            running=len(residents.decoding),
            receiving=parked.count(Status.RECEIVING),
            held=parked.count(Status.HELD),
            waiting_tokens=queue.tokens + sum(len(request.tokens) for request in preempted),
            free_pages=self.blocks.available,
            cached_pages=self.blocks.cached,
            total_pages=self.blocks.num_pages,
            hit_tokens=residents.hit_tokens,
            queried_tokens=residents.queried_tokens,
            preemptions=residents.preemptions,
            mean_output=residents.mean_output,
        )

    # ---- requests come and go

    def add(self, request: Request, now: float | None = None, *, force: bool = False) -> None:
        """Queues a request.

        Args:
            request: new, not empty, and the scheduler's from now on.
            now: seconds; its arrival if None.
            force: queue it even if the queue is full.

        Raises:
            ValueError: it can never run, or its id is in use.
            OverloadedError: the queue is full.
        """
        assert not request.empty, request
        self.check(request)
        queue, config = self._queue, self.config
        if not force and len(queue) >= config.max_waiting:
            raise OverloadedError(f"{len(queue)} requests wait already (max_waiting): try later")
        tokens = queue.tokens + len(request.tokens)
        if not force and len(queue) and tokens > config.max_waiting_tokens:
            raise OverloadedError(
                f"{queue.tokens} tokens wait already and the prompt has {len(request.tokens)} "
                f"(max_waiting_tokens={config.max_waiting_tokens}): try later"
            )
        entry = self._entry(request)
        if not request.scored:
            found = self.blocks.match(request.tokens, chain=entry.chain)
            entry.uncached -= len(found) * config.page_size
        queue.restart(entry, request.arrival if now is None else now)
        request.status = Status.WAITING
        self._residents.entries[request.id] = entry
        queue.push(entry)

    def abort(self, request_id: str, *, spoiled: bool = False) -> Request | None:
        """Ends a request in any state, without an event.

        Pages of a received or held request go back at once: nobody may be writing or reading them.

        Args:
            request_id: the request.
            spoiled: what it has in the cache is wrong: its pages, shared ones apart, are no longer
                found, and no page becomes findable.

        Returns:
            The request, or None if there is none that has not ended.
        """
        entry = self._residents.entries.get(request_id)
        self._refused.pop(request_id, None)
        if entry is None:
            return None
        slot = entry.request.slot
        if spoiled and slot >= 0:
            self.blocks.forget(self._table.pages[slot][entry.shared :])
            self._table.seal_no_more(np.array([slot]))
        self._residents.end(entry)
        self._residents.collect()
        return entry.request

    def finish(
        self, request_id: str, reason: FinishReason, keep_tokens: int | None = None
    ) -> Request | None:
        """Ends a request whose answer is complete, without a further event.

        Args:
            request_id: the request.
            reason: why; a request that stops counts for the mean output length, an aborted doesn't.
            keep_tokens: new tokens that belong to the answer; None keeps all.

        Returns:
            The request, or None if it has ended already.
        """
        request = self.abort(request_id)
        if request is None:
            return None
        if keep_tokens is not None:
            del request.tokens[request.prompt_len + keep_tokens :]
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._residents.count_output(request)
        return request

    def reserve(self, request: Request, now: float | None = None) -> int | None:
        """Takes slot and pages for a request whose cache another engine sends: RECEIVING.

        Room is needed as for an admission, and preempted requests come first. The receiver fills
        the rows of all tokens of `request` from the returned count on, into `pages(request.id)`.

        Returns:
            Tokens found in the prefix cache, or None if there is no room: try again later.

        Raises:
            ValueError: it can never run, or its id is in use.
        """
        self.check(request)
        head = self._queue.head
        if self._residents.stalled or (head is not None and head.request.admissions):
            return None
        entry = self._refused.pop(request.id, None)
        if entry is None or entry.request is not request:
            entry = self._entry(request)
        if not self._table.try_take(entry, len(request.tokens)):
            self._refused[request.id] = entry
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            return None
        self._residents.entries[request.id] = entry
        self._residents.park(entry, Status.RECEIVING)
        self._residents.admitted(entry, request.arrival if now is None else now)
        return request.cached

    def start_received(self, request_id: str, tokens: Sequence[int]) -> None:
        """The rows of all tokens a RECEIVING request had are in the cache; it decodes from now on.

        Args:
            request_id: the request.
            tokens: its first new token; no event tells of it.

        Raises:
            KeyError: there is no such request.
            ValueError: it receives nothing, or not exactly one token that leaves some to come.
        """
        entry = self._residents.entries[request_id]
        request = entry.request
        if request.status is not Status.RECEIVING:
            raise ValueError(f"{request} is not RECEIVING: reserve it first, start it once")
        if len(tokens) != 1 or request.remaining < 2:
            raise ValueError(
                f"{request} got {len(tokens)} tokens: hand over the first new one, and only if "
                "max_tokens allows more"
            )
        slot = request.slot
        request.tokens.extend(tokens)
        request.cached = len(request.tokens) - 1
        self._table.left[slot] = request.remaining
        self._table.seal(slot, request.cached)
        self._residents.fresh.add(slot)
        self._residents.decode(entry)

    def release(self, request_id: str, *, failed: bool = False) -> Request | None:
        """Ends a HELD or RECEIVING request and gives its slot and pages back.

        Args:
            request_id: the request.
            failed: the transfer failed. What was received is not used for anything; what was
                computed here stays in the prefix cache.

        Returns:
            The request, or None if it has ended already.

        Raises:
            ValueError: it is neither.
        """
        entry = self._residents.entries.get(request_id)
        if entry is None:
            return self.abort(request_id)
        status = entry.request.status
        if status not in (Status.HELD, Status.RECEIVING):
            raise ValueError(f"{entry.request} is neither HELD nor RECEIVING: abort it")
        return self.abort(request_id, spoiled=failed and status is Status.RECEIVING)

    # ---- steps

    def schedule(self, now: float) -> StepPlan | None:
        """Plans the next step, to be launched before anything else is asked of the scheduler.

        Args:
            now: seconds.

        Returns:
            The plan, whose lists nobody may change; None if there is nothing to do before another
            result is applied or another request comes.
        """
        assert self._launched - self._applied < MAX_LAUNCHED, "apply a result first"
        plan = self._planner.plan(self._launched, now)
        self._launched += plan is not None
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Takes in what the oldest launched step did.

        Args:
            plan: that step.
            result: what it did.
            now: seconds.

        Returns:
            An event for each row that brought tokens, with the finish if the device ended it: STOP
            with the id if that was an eos or a stop id, LENGTH otherwise. A request that is only
            prefilled becomes HELD with its first token. One that wants no token ends with its last
            prompt row.
        """
        assert plan.number == self._applied, (plan.number, self._applied)
        self._applied += 1
        return self._results.apply(plan, result, now)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Tells whoever picks the drafts what an applied step took and brought.

        Steps with prompt rows are left out: their time says nothing about drafts.

        Args:
            plan: the step.
            result: what it did.
            seconds: from the result before it to its own, or from its launch if that was later.
        """
        drafting = self._drafting
        if drafting is None or len(drafting.ladder) == 1 or plan.chunks or not plan.requests:
            return
        accepted, offered = int(result.accepted.sum()), int(result.offered.sum())
        drafting.observe(len(plan.requests), plan.drafts, seconds, accepted, offered)

    def _entry(self, request: Request) -> Entry:
        self._arrived += 1
        return Entry(request, self.blocks.chain(request.salt), self._arrived)

    def check(self, request: Request) -> None:
        """Whether the request could ever run.

        Raises:
            ValueError: it is too long for a sequence or for the pool, or its id is in use.
        """
        config, stop = self.config, request.stop
        if request.id in self._residents.entries:
            raise ValueError(f"request id {request.id!r} is in use: give each request its own")
        rows = request.prompt_len + stop.max_tokens
        if rows > config.max_columns * config.page_size:
            raise ValueError(
                f"{request.prompt_len} prompt tokens + max_tokens={stop.max_tokens} exceed the "
                f"longest sequence of {config.max_columns * config.page_size} tokens: shorten the "
                "prompt or lower max_tokens"
            )
        if request.prefill_only:
            rows = min(rows, request.prompt_len + config.first_rows)
        if config.pages(rows) > config.num_pages:
            raise ValueError(
                f"{rows} tokens need {config.pages(rows)} pages and the pool has "
                f"{config.num_pages}: shorten the prompt, lower max_tokens or give the cache more "
                "memory"
            )
