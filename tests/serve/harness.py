"""A scheduler and a fake device, run as an engine runs them, with every result checked."""

import contextlib
from collections import deque

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from serve.blocks import BlockManager
from serve.drafting import DraftPolicy
from serve.plan import StepPlan, TokenEvent
from serve.request import FinishReason, Request, StopOptions
from serve.results import token_logprobs
from serve.scheduler import MAX_LAUNCHED, Scheduler
from serve.scheduler_config import SchedulerConfig
from tests.serve.fake import FakePending, FakeRunner, continuation, scores

EOS = (0,)


def make_config(**changes) -> SchedulerConfig:
    sizes = dict(num_slots=4, num_pages=32, page_size=4, max_columns=16, max_prefill_tokens=16)
    return SchedulerConfig(
        **{**sizes, "max_chunks": 4, "reserve_tokens": 4, "max_wait": 1e9, **changes}
    )


def make_request(id: str, prompt, max_tokens: int = 8, **options) -> Request:
    keys = ("min_tokens", "ignore_eos", "stop_token_ids")
    stop = {key: options.pop(key) for key in keys if key in options}
    return Request(id, prompt, stop=StopOptions(max_tokens=max_tokens, **stop), **options)


def prompt(length: int, first: int = 1) -> list[int]:
    return [1 + (first * 17 + i * 5) % 60 for i in range(length)]


def long_answer(length: int, tokens: int) -> list[int]:
    """A prompt whose answer does not end before `tokens`."""
    for first in range(1000):
        found = prompt(length, first)
        options = make_request("x", found, tokens).stop
        if len(continuation(found, options, EOS)[0]) == tokens:
            return found
    raise AssertionError


def assert_red(machine: type[RuleBasedStateMachine], match: str) -> None:
    """The machine finds what is wrong with the code that it runs on, and says so."""
    profile = settings(
        max_examples=300, stateful_step_count=40, phases=[Phase.generate], print_blob=False
    )
    with pytest.raises(AssertionError, match=match):
        run_state_machine_as_test(machine, settings=profile)


class Harness:
    """Adds requests, makes steps `depth` launches ahead, collects and checks what comes out.

    Attributes:
        tokens: new tokens of each request so far, by id.
        ends: events with a finish, by id.
        plans: every plan so far.
        wasted: launches of rows that had ended, by id.
        broken: a check failed, so nothing that follows means anything.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        depth: int = MAX_LAUNCHED,
        drafting: DraftPolicy | None = None,
        acceptance: float = 0.6,
        blocks: BlockManager | None = None,
    ):
        self.config = config
        self.blocks = blocks or BlockManager(
            config.num_pages, config.page_size, lookahead=config.lookahead, tail=config.tail
        )
        self.scheduler = Scheduler(config, self.blocks, eos_ids=EOS, drafting=drafting)
        self.runner = FakeRunner(config, eos_ids=EOS, acceptance=acceptance)
        self.depth = depth
        self.now = 0.0
        self.launched: deque[tuple[StepPlan, FakePending]] = deque()
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, TokenEvent] = {}
        self.plans: list[StepPlan] = []
        self.wasted: dict[str, int] = {}
        self.broken = False

    def add(self, id: str, prompt, max_tokens: int = 8, **options) -> Request:
        request = make_request(id, prompt, max_tokens, arrival=self.now, **options)
        self.scheduler.add(request)
        self.tokens[id] = []
        return request

    def launch(self) -> StepPlan | None:
        """Schedules a step and launches it, if there is one."""
        with self._guard():
            plan = self.scheduler.schedule(self.now)
            if plan is not None:
                self.plans.append(plan)
                self._check_writes(plan)
                self.launched.append((plan, self.runner.launch(plan, self.scheduler.page_table)))
        return plan

    def fetch(self) -> list[TokenEvent]:
        """Applies the oldest launched step."""
        with self._guard():
            return self._fetch()

    @contextlib.contextmanager
    def _guard(self):
        self.broken = True
        yield
        self.broken = False

    def _fetch(self) -> list[TokenEvent]:
        plan, pending = self.launched.popleft()
        result = self.runner.fetch(pending)
        live = {r.id for r in self.scheduler.requests}
        for request, count in zip(plan.requests, result.count.tolist(), strict=True):
            if not count:
                self.wasted[request.id] = self.wasted.get(request.id, 0) + 1
                assert self.wasted[request.id] <= 1, f"{request} was launched after its end twice"
        events = self.scheduler.apply(plan, result, self.now)
        for event in events:
            assert event.request.id in live, f"{event} of a request that has ended"
            self._take(event)
        return events

    def step(self) -> bool:
        """One turn of an engine's loop; False if there was nothing to do."""
        self.now += 1.0
        plan = self.launch() if len(self.launched) < MAX_LAUNCHED else None
        if self.launched and (plan is None or len(self.launched) >= self.depth):
            self.fetch()
            return True
        return plan is not None

    def drain(self, steps: int = 2000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError(f"still busy after {steps} steps: {self.scheduler.requests}")

    def run(self, id: str, prompt, max_tokens: int = 8, **options) -> Request:
        """Serves one more request, and whatever else there is, to the end."""
        request = self.add(id, prompt, max_tokens, **options)
        self.drain()
        assert id in self.ends
        return request

    def check(self) -> None:
        """The books balance, and no page under a launched step is free."""
        with self._guard():
            self._check_books()

    def _check_books(self) -> None:
        table = self.scheduler._table
        holders = [pages for pages in table.pages if pages]
        self.blocks.check(holders)
        for slot, pages in enumerate(table.pages):
            row = self.scheduler.page_table[slot]
            assert row[: len(pages)].tolist() == pages and (row[len(pages) :] == -1).all()
            assert table.held[slot] == len(pages)
        held = {page for pages in holders for page in pages}
        for plan, pending in self.launched:
            slots = {*pending.slots, *(slot for slot, _, _ in pending.chunks)}
            under_way = {int(p) for slot in slots for p in pending.table[slot] if p >= 0}
            assert under_way <= held, f"step {plan.number} runs on free pages {under_way - held}"

    def check_drained(self) -> None:
        """Every slot and every page is back."""
        self.check()
        stats = self.scheduler.stats()
        assert self.scheduler.idle and self.blocks.available == self.config.num_pages, stats
        assert (self.scheduler.page_table == -1).all()
        assert stats[:6] == (0, 0, 0, 0, 0, 0), stats
        assert self.scheduler._table.free == self.config.num_slots

    def _take(self, event: TokenEvent) -> None:
        request = event.request
        assert request.id not in self.ends, f"{event} after its end"
        tokens = self.tokens[request.id]
        self._check_scores(event, first=not tokens)
        tokens += event.tokens
        wanted, reason = continuation(request.tokens[: request.prompt_len], request.stop, EOS)
        assert tokens == wanted[: len(tokens)], (request, tokens, wanted)
        assert request.tokens[request.prompt_len :] == tokens
        if event.finish is None:
            assert len(tokens) < len(wanted), f"{request} goes on after its end"
            return
        assert tokens == wanted and event.finish is reason, (event, wanted, reason)
        assert (event.stop_token is not None) == (reason is FinishReason.STOP)
        self.ends[request.id] = event

    def _check_scores(self, event: TokenEvent, first: bool) -> None:
        """Those of the prompt come once, with the first tokens, and all rows were computed."""
        request, best = event.request, event.request.sampling.prompt_logprobs
        if best is None or not first:
            assert event.prompt_logprobs is None, event
            return
        prompt = request.tokens[: request.prompt_len]
        wanted = token_logprobs(scores(prompt, 0, len(prompt) - 1), best)
        assert event.prompt_logprobs == wanted, (request, event.prompt_logprobs, wanted)
        assert not request.hit, f"{request} is scored and took rows from the cache"

    def _check_writes(self, plan: StepPlan) -> None:
        """No row of the step lies in a page that somebody else holds or could find."""
        table, blocks, size = self.scheduler._table, self.blocks, self.config.page_size
        firsts = [(chunk.request, chunk.start) for chunk in plan.chunks]
        firsts += [(r, max(int(table.length[r.slot]) - self.config.tail, 0)) for r in plan.requests]
        for request, first in firsts:
            for page in table.pages[request.slot][first // size :]:
                assert blocks._refs[page] == 1, f"{request} writes into shared page {page}"
        for request in plan.requests:
            later = table.pages[request.slot][int(table.length[request.slot]) // size :]
            assert all(blocks._keys[page] is None for page in later), "writes into a findable page"
        assert np.array_equal(plan.slots, [request.slot for request in plan.requests])
