"""A scheduler of several ranks over a fake device for each."""

from collections import deque

import numpy as np

from serve.blocks import BlockManager
from serve.buckets import Buckets, Variant
from serve.drafting import DraftPolicy
from serve.plan import StepResult
from serve.rank_scheduler import RankScheduler
from serve.request import Request
from tests.serve.fake import FakeRunner, continuation
from tests.serve.harness import EOS, make_config

BUCKETS = Buckets(batches=(2, 4), chunk_shapes=((1, 16), (4, 4)), drafts=(0, 1, 2), columns=(4, 16))


def make(
    ranks: int = 2,
    drafting: DraftPolicy | None = None,
    drafts: int = 0,
    kind: type[RankScheduler] = RankScheduler,
    **changes,
) -> RankScheduler:
    """An empty scheduler; `changes` are of each rank's config."""
    config = make_config(drafts=drafts, **changes)
    pools = [
        BlockManager(
            config.num_pages, config.page_size, lookahead=config.lookahead, tail=config.tail
        )
        for _ in range(ranks)
    ]
    return kind(
        config,
        pools,
        buckets=BUCKETS,
        needed=lambda request: Variant.FULL if request.stop.min_tokens else Variant.PLAIN,
        eos_ids=EOS,
        drafting=drafting,
    )


class Devices:
    """A fake device for each rank, stepped one launch ahead, whose results come as one.

    Attributes:
        tokens: new tokens of each request so far, by id.
        plans: every plan so far.
    """

    def __init__(self, scheduler: RankScheduler):
        self.scheduler = scheduler
        self.ranks = [FakeRunner(rank.config, eos_ids=EOS) for rank in scheduler.ranks]
        self.launched = deque()
        self.tokens: dict[str, list[int]] = {}
        self.plans = []

    def step(self) -> bool:
        """One turn of an engine's loop; False if there was nothing to do."""
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            tables = np.split(self.scheduler.page_table, len(self.ranks))
            pairs = zip(self.ranks, plan.parts, tables, strict=True)
            self.launched.append((plan, [d.launch(p, t) if p else None for d, p, t in pairs]))
            self.plans.append(plan)
        if len(self.launched) > (plan is not None):
            plan, pending = self.launched.popleft()
            results = [d.fetch(p) for d, p in zip(self.ranks, pending, strict=True) if p]
            columns = [
                np.concatenate(column) for column in zip(*(r[:5] for r in results), strict=True)
            ]
            scores = [entry for r in results for entry in r.prompt_logprobs]
            for event in self.scheduler.apply(plan, StepResult(*columns, None, scores), 0.0):
                self.tokens.setdefault(event.request.id, []).extend(event.tokens)
            return True
        return plan is not None

    def drain(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass
        assert self.scheduler.idle

    def receive(self, request: Request, hit: int) -> None:
        """Another engine's rows of a reserved request come, and its first token: it decodes."""
        scheduler = self.scheduler
        first = continuation(request.tokens, request.stop, EOS)[0][:1]
        device = self.ranks[scheduler.rank_of(request.id)]
        device.receive([*request.tokens, *first], scheduler.pages(request.id), hit, request.id)
        scheduler.start_received(request.id, first)
        self.tokens[request.id] = list(first)

    def check(self) -> None:
        """On every rank the books balance: each page is held by whom the table says, or free."""
        each = self.scheduler.config.num_slots // len(self.ranks)
        for at, rank in enumerate(self.scheduler.ranks):
            table = rank._table
            rank.blocks.check([pages for pages in table.pages if pages])
            rows = self.scheduler.page_table[at * each : (at + 1) * each]
            for row, pages in zip(rows, table.pages, strict=True):
                assert row[: len(pages)].tolist() == pages and (row[len(pages) :] == -1).all()

    def free(self) -> list[int]:
        """Pages of each rank that nobody holds."""
        return [rank.stats().free_pages for rank in self.scheduler.ranks]
