"""The scheduler of an engine whose ranks have queues, slots and pages of their own.

    add(request) -> the rank with most free room; a request never moves
    reserve()    -> the same for a request whose cache comes from another engine
    schedule()   -> every rank plans for itself, all agree on sizes: one step, or none
    apply()      -> every rank takes in what the step did for its own rows

Towards an engine it is a `serve.scheduler.Scheduler`; each rank has a real one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from serve.agree import Sizes, agree
from serve.blocks import BlockManager
from serve.buckets import Buckets, Variant
from serve.drafting import DraftPolicy
from serve.plan import Chunk, StepLogprobs, StepPlan, StepResult, TokenEvent
from serve.request import FinishReason, Request
from serve.scheduler import Scheduler
from serve.scheduler_config import SchedulerConfig, SchedulerStats


@dataclasses.dataclass(slots=True)
class RanksPlan(StepPlan):
    """One launch of all ranks.

    What it has as a `StepPlan` is that of all ranks, one after another, and `slots` count over all
    of them: slot s of rank r is r * S + s if each has S.

    Attributes:
        parts: each rank's plan, None for one with nothing to do.
        sizes: of the step, which all ranks agreed on.
    """

    parts: tuple[StepPlan | None, ...]
    sizes: Sizes

    @property
    def idle(self) -> int:
        """Ranks that have nothing to do and run padding."""
        return self.parts.count(None)


class Member:
    """One rank where ranks agree: says what it needs, and takes the step that came of it.

    For each step, on every rank: `propose`, `serve.agree.agree` on what all proposed, `adopt`.

    Args:
        scheduler: of the rank.
        buckets: of the engine.
        needed: what a request asks of the decode step.
    """

    def __init__(
        self, scheduler: Scheduler, buckets: Buckets, needed: Callable[[Request], Variant]
    ):
        self.scheduler = scheduler
        self._buckets, self._needed = buckets, needed
        self._plan: StepPlan | None = None
        self._requests: list[Request] = []
        self._variant = Variant.PLAIN

    def propose(self, now: float) -> Sizes:
        """Plans the rank's next step and says what it needs."""
        self._plan = plan = self.scheduler.schedule(now)
        # The scheduler shares the list between plans: look at the requests only when they change.
        if plan is not None and plan.requests is not self._requests:
            self._requests = plan.requests
            self._variant = max(map(self._needed, plan.requests), default=Variant.PLAIN)
        return Sizes.of(plan, self._variant, self._buckets)

    def adopt(self, sizes: Sizes) -> StepPlan | None:
        """The rank's part of the step that was agreed on; None if it has none and runs padding."""
        if self._plan is not None:
            self._plan.drafts = sizes.drafts
        return self._plan


class RankScheduler:
    """Requests in, plans of all ranks out, results in, events out. One thread.

    Args:
        config: sizes and policy of one rank.
        blocks: the pool of each rank.
        buckets: of the engine.
        needed: what a request asks of the decode step.
        eos_ids: ids that end a request unless it ignores them.
        drafting: picks the drafts of a step, for all ranks; None is always `config.drafts`.

    Attributes:
        config: sizes and policy of all ranks together.
        ranks: each rank's scheduler.

    Raises:
        ValueError: `blocks` and `config` disagree.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: Sequence[BlockManager],
        *,
        buckets: Buckets,
        needed: Callable[[Request], Variant],
        eos_ids: tuple[int, ...] = (),
        drafting: DraftPolicy | None = None,
    ):
        count, each = len(blocks), config.num_slots
        self.config = dataclasses.replace(
            config, num_slots=count * each, num_pages=count * config.num_pages
        )
        self._drafting, self._each = drafting, each
        self._page_table = np.empty((count * each, config.max_columns), np.int32)
        self.ranks = [
            Scheduler(
                config,
                pool,
                eos_ids=eos_ids,
                page_table=self._page_table[rank * each : (rank + 1) * each],
            )
            for rank, pool in enumerate(blocks)
        ]
        self._members = [Member(rank, buckets, needed) for rank in self.ranks]
        self._number = 0
        self._requests: list[Request] = []

    # ---- what an engine reads

    @property
    def page_table(self) -> np.ndarray:
        """int32 [slots of all ranks, max_columns]; pages count from 0 on each rank."""
        return self._page_table

    @property
    def requests(self) -> list[Request]:
        """Every request that has not ended."""
        return [request for rank in self.ranks for request in rank.requests]

    @property
    def idle(self) -> bool:
        """See `Scheduler.idle`."""
        return all(rank.idle for rank in self.ranks)

    def find(self, request_id: str) -> Request | None:
        """The request of that id, if it has not ended."""
        at = self.rank_of(request_id)
        return None if at is None else self.ranks[at].find(request_id)

    def rank_of(self, request_id: str) -> int | None:
        """The rank of a request that has not ended."""
        found = (at for at, rank in enumerate(self.ranks) if rank.find(request_id) is not None)
        return next(found, None)

    def pages(self, request_id: str) -> list[int]:
        """See `Scheduler.pages`; on the request's rank.

        Raises:
            KeyError: there is no such request.
        """
        at = self.rank_of(request_id)
        if at is None:
            raise KeyError(request_id)
        return self.ranks[at].pages(request_id)

    def stats(self) -> SchedulerStats:
        """All ranks together; the mean output length is that of the ranks that have one."""
        each = [rank.stats() for rank in self.ranks]
        *sums, _ = (sum(column) for column in zip(*each, strict=True))
        means = [stats.mean_output for stats in each if stats.mean_output]
        return SchedulerStats(*sums, mean_output=sum(means) / max(len(means), 1))

    # ---- requests come and go

    def check(self, request: Request) -> None:
        """See `Scheduler.check`; a request has to fit into one rank.

        Raises:
            ValueError: it could never run.
        """
        for rank in self.ranks:
            rank.check(request)

    def add(self, request: Request, now: float | None = None, *, force: bool = False) -> None:
        """Queues a request at the rank that will have most free room with it.

        Raises:
            ValueError: see `check`.
            OverloadedError: that rank's queue is full.
        """
        self.check(request)
        self.ranks[by_room(self.ranks, request)[0]].add(request, now, force=force)

    def abort(self, request_id: str, *, spoiled: bool = False) -> Request | None:
        """See `Scheduler.abort`."""
        ended = [rank.abort(request_id, spoiled=spoiled) for rank in self.ranks]
        return next((request for request in ended if request is not None), None)

    def finish(
        self, request_id: str, reason: FinishReason, keep_tokens: int | None = None
    ) -> Request | None:
        """See `Scheduler.finish`."""
        ended = [rank.finish(request_id, reason, keep_tokens) for rank in self.ranks]
        return next((request for request in ended if request is not None), None)

    def reserve(self, request: Request, now: float | None = None) -> int | None:
        """See `Scheduler.reserve`; the ranks are asked in turn, the one with most room first."""
        self.check(request)
        hits = (self.ranks[at].reserve(request, now) for at in by_room(self.ranks, request))
        return next((hit for hit in hits if hit is not None), None)

    def start_received(self, request_id: str, tokens: Sequence[int]) -> None:
        """See `Scheduler.start_received`.

        Raises:
            KeyError: there is no such request.
        """
        at = self.rank_of(request_id)
        if at is None:
            raise KeyError(request_id)
        self.ranks[at].start_received(request_id, tokens)

    def release(self, request_id: str, *, failed: bool = False) -> Request | None:
        """See `Scheduler.release`."""
        ended = [rank.release(request_id, failed=failed) for rank in self.ranks]
        return next((request for request in ended if request is not None), None)

    # ---- steps

    def schedule(self, now: float) -> RanksPlan | None:
        """Plans the next step of all ranks; None if none of them has anything to do."""
        sizes = agree([member.propose(now) for member in self._members])
        if sizes.empty:
            return None
        if sizes.rows and self._drafting is not None:
            sizes = sizes._replace(drafts=self._drafting.pick(sizes.rows, sizes.drafts))
        parts = tuple(member.adopt(sizes) for member in self._members)
        busy = [(at, part) for at, part in enumerate(parts) if part is not None]
        requests = [request for _, part in busy for request in part.requests]
        if requests == self._requests:  # whoever groups them need not do so again
            requests = self._requests
        self._requests = requests
        plan = RanksPlan(
            number=self._number,
            admit=[request for _, part in busy for request in part.admit],
            requests=requests,
            slots=np.concatenate([part.slots + np.int32(at * self._each) for at, part in busy]),
            drafts=sizes.drafts,
            chunks=[chunk for _, part in busy for chunk in part.chunks],
            columns=sizes.columns,
            parts=parts,
            sizes=sizes,
        )
        self._number += 1
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """See `Scheduler.apply`; events of all ranks."""
        assert isinstance(plan, RanksPlan)
        events, first = [], 0
        for rank, part in zip(self.ranks, plan.parts, strict=True):
            if part is not None:
                events += rank.apply(part, _rows(result, first, part), now)
                first += len(part.requests)
        return events

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """See `Scheduler.observe`; the batch is that of the fullest rank."""
        assert isinstance(plan, RanksPlan)
        drafting = self._drafting
        if drafting is None or len(drafting.ladder) == 1 or plan.chunks or not plan.requests:
            return
        accepted, offered = int(result.accepted.sum()), int(result.offered.sum())
        drafting.observe(plan.sizes.rows, plan.drafts, seconds, accepted, offered)


def by_room(ranks: Sequence[Scheduler], request: Request) -> list[int]:
    """The ranks, first the one that will have most free room when it has the request: a free slot
    first, then free pages. Those of its prefix cache that the request shares are free twice: they
    are not taken.
    """

    def room(at: int) -> tuple[bool, int, int, int]:
        scheduler = ranks[at]
        stats, config = scheduler.stats(), scheduler.config
        slots = config.num_slots - sum(stats[:5])
        pages = stats.free_pages - config.pages(
            stats.waiting_tokens + stats.waiting * config.reserve_tokens
        )
        shared = [] if request.scored else scheduler.blocks.match(request.tokens, request.salt)
        return (slots > 0, pages + len(shared), slots, -at)

    return sorted(range(len(ranks)), key=room, reverse=True)


def _rows(result: StepResult, first: int, part: StepPlan) -> StepResult:
    """A rank's part of a result, its decoding rows from `first` on."""
    own = slice(first, first + len(part.requests))
    logprobs = result.logprobs
    if logprobs is not None:
        logprobs = StepLogprobs(*(column[own] for column in logprobs))
    scores: Sequence[tuple[Chunk, StepLogprobs]] = ()
    if result.prompt_logprobs:
        mine = {chunk.request.id for chunk in part.chunks}
        scores = [entry for entry in result.prompt_logprobs if entry[0].request.id in mine]
    return StepResult(
        tokens=result.tokens[own],
        count=result.count[own],
        accepted=result.accepted[own],
        offered=result.offered[own],
        finished=result.finished[own],
        logprobs=logprobs,
        prompt_logprobs=scores,
    )
