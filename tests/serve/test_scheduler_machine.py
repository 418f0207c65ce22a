"""Random lives of requests on a tiny pool; the fake device reads back every context it decodes."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.blocks import BlockManager, Chain
from serve.planner import Planner
from serve.request import FinishReason, Request, SamplingOptions, Status
from serve.residents import Residents
from serve.scheduler import MAX_LAUNCHED
from serve.slots import SlotTable
from tests.serve.fake import continuation
from tests.serve.harness import EOS, Harness, assert_red, make_config, make_request

# Few tokens, so that prompts share beginnings and differ soon after them.
PROMPTS = st.lists(st.sampled_from((1, 1, 1, 2)), min_size=1, max_size=14)
MTP = st.sampled_from(((0, 0, 0), (1, 1, 0), (2, 2, 1), (3, 3, 2), (3, 1, 0)))


class Machine(RuleBasedStateMachine):
    """What clients, another engine and the loop of this one may do, in any order."""

    @initialize(
        mtp=MTP,
        mixed=st.booleans(),
        policy=st.sampled_from(("short-first", "fcfs")),
        pages=st.integers(10, 16),
        size=st.integers(2, 3),
        reserve=st.sampled_from((0, 6)),
        acceptance=st.sampled_from((0.3, 0.9)),
    )
    def begin(self, mtp, mixed, policy, pages, size, reserve, acceptance):
        drafts, lookahead, tail = mtp
        config = make_config(
            num_slots=3,
            num_pages=pages,
            page_size=size,
            max_columns=10,
            drafts=drafts,
            lookahead=lookahead,
            tail=tail,
            max_prefill_tokens=7,
            max_chunks=2,
            max_skips=3,
            mixed=mixed,
            prefill_policy=policy,
            reserve_tokens=reserve,
        )
        self.harness = self.make(config, acceptance)
        self.count = 0
        self.received: list = []
        self.aborted: set[str] = set()

    def make(self, config, acceptance):
        return Harness(config, acceptance=acceptance)

    def draw(self, prompt, most):
        """A name, and as many tokens as there is room for."""
        self.count += 1
        config = self.harness.config
        room = config.max_columns * config.page_size - len(prompt)
        return f"r{self.count}", min(most, room)

    @rule(
        prompt=PROMPTS,
        most=st.integers(1, 12),
        priority=st.integers(0, 1),
        salt=st.sampled_from(("", "", "x")),
        only=st.sampled_from((False, False, True)),
        ignore_eos=st.booleans(),
        scored=st.sampled_from((None, None, 0, 2)),
        silent=st.booleans(),
    )
    def add(self, prompt, most, priority, salt, only, ignore_eos, scored, silent):
        id, most = self.draw(prompt, most)
        if silent and scored is not None and len(prompt) > 1:
            most = 0  # the scores are all that is wanted
        options = dict(priority=priority, salt=salt, prefill_only=only, ignore_eos=ignore_eos)
        options["sampling"] = SamplingOptions(prompt_logprobs=scored)
        self.harness.add(id, prompt, most, **options)

    @precondition(lambda self: len(self.harness.launched) < MAX_LAUNCHED)
    @rule()
    def launch(self):
        self.harness.now += 1.0
        self.harness.launch()

    @precondition(lambda self: self.harness.launched)
    @rule()
    def fetch(self):
        self.harness.fetch()

    @rule(steps=st.integers(1, 6))
    def run(self, steps):
        for _ in range(steps):
            self.harness.step()

    @precondition(lambda self: self.harness.scheduler.requests)
    @rule(data=st.data(), stop=st.booleans())
    def end(self, data, stop):
        request = data.draw(st.sampled_from(self.harness.scheduler.requests))
        if stop:
            self.harness.scheduler.finish(request.id, FinishReason.STOP)
        else:
            self.harness.scheduler.abort(request.id)
        self.aborted.add(request.id)

    @rule(prompt=PROMPTS, most=st.integers(2, 12))
    def reserve(self, prompt, most):
        id, most = self.draw(prompt, most)
        request = make_request(id, prompt, most, arrival=self.harness.now)
        first, reason = continuation(prompt, request.stop, EOS)
        if len(first) == 1:
            return  # it ended where it was prefilled
        self.harness.tokens[id] = []
        hit = self.harness.scheduler.reserve(request)
        if hit is None:
            self.aborted.add(id)
        else:
            self.received.append((request, hit, first[:1]))

    @precondition(lambda self: self.received)
    @rule(failed=st.sampled_from((False, False, True)))
    def arrive(self, failed):
        harness, (request, hit, first) = self.harness, self.received.pop(0)
        if request.status is not Status.RECEIVING:
            return
        pages = harness.scheduler.pages(request.id)
        if failed:  # half of it came
            harness.runner.trunk[pages[hit // harness.config.page_size :]] = 99
            harness.scheduler.release(request.id, failed=True)
            self.aborted.add(request.id)
            return
        harness.runner.receive([*request.tokens, *first], pages, hit, request.id)
        harness.scheduler.start_received(request.id, first)
        harness.tokens[request.id] += first

    @rule(failed=st.booleans())
    def release(self, failed):
        for request in self.harness.scheduler.requests:
            if request.status is Status.HELD:
                assert request.emitted >= 1
                self.aborted.add(request.id)
                self.harness.scheduler.release(request.id, failed=failed)
                return

    @invariant()
    def balance(self):
        if hasattr(self, "harness"):
            self.harness.check()

    def teardown(self):
        harness = getattr(self, "harness", None)
        if harness is None or harness.broken:
            return
        for _ in range(100):  # what is held keeps others waiting
            harness.drain()
            while self.received:
                self.arrive(failed=False)
            self.release(failed=False)
            if harness.scheduler.idle:
                break
        harness.check_drained()
        assert set(harness.tokens) == set(harness.ends) | self.aborted


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40)


# ---- planted bugs


def test_machine_sees_slots_and_pages_released_at_once(monkeypatch):
    def collect(self):
        for slot in list(self.leaving):
            self.table.holds[slot] = 0
        collect_right(self)

    collect_right = Residents.collect
    monkeypatch.setattr(Residents, "collect", collect)
    assert_red(Machine, "runs on free pages")


def test_machine_sees_keys_without_lookahead(monkeypatch):
    def extend(self, tokens, pages):
        ahead, self._lookahead = self._lookahead, 0
        right(self, tokens[: len(tokens) - ahead], pages)
        self._lookahead = ahead

    right = Chain.extend
    monkeypatch.setattr(Chain, "extend", extend)
    assert_red(Machine, "in shared rows")


def test_machine_sees_pages_published_too_early(monkeypatch):
    right = SlotTable.seal

    def seal(self, slot, length):  # as if the last step's rows were final for the modules
        right(self, slot, len(self.entry(slot).request.tokens) + 1)

    monkeypatch.setattr(SlotTable, "seal", seal)
    assert_red(Machine, "writes into a findable page")


def test_machine_sees_hits_that_leave_no_tail(monkeypatch):
    right = BlockManager.match

    def match(self, tokens, salt="", limit=None, *, chain=None):
        tail, self.tail = self.tail, -1
        found = right(self, tokens, salt, limit, chain=chain)
        self.tail = tail
        return found

    monkeypatch.setattr(BlockManager, "match", match)
    assert_red(Machine, r"into a findable page|into shared page|no hidden|\d+, -1\)")


def test_machine_sees_too_few_pages_for_the_steps_ahead(monkeypatch):
    right = SlotTable.wanted

    def wanted(self, slots):  # the result of the step before is forgotten
        ahead = self.ahead[slots].copy()
        going, _, held = right(self, slots)
        self.ahead[slots] = 0
        _, pages, _ = right(self, slots)
        self.ahead[slots] = ahead
        return going, pages, held

    monkeypatch.setattr(SlotTable, "wanted", wanted)
    assert_red(Machine, "have no page|exceed . columns")


def test_machine_sees_an_admission_left_out(monkeypatch):
    right = Planner.plan

    def plan(self, number, now):
        made = right(self, number, now)
        if made is not None and made.requests:
            made.admit[:] = [r for r in made.admit if r not in made.requests]
        return made

    monkeypatch.setattr(Planner, "plan", plan)
    assert_red(Machine, "was not admitted")


def test_machine_sees_a_scored_prompt_that_is_taken_from_the_cache(monkeypatch):
    right = SlotTable.try_take

    def try_take(self, entry, length):
        with monkeypatch.context() as patch:
            patch.setattr(Request, "scored", property(lambda self: False))
            return right(self, entry, length)

    monkeypatch.setattr(SlotTable, "try_take", try_take)
    assert_red(Machine, r"\d scores")
