"""An adaptive engine measures its steps and settles on the number of drafts that pays."""

from collections import deque

import pytest

from serve.drafting import DraftPolicy
from serve.engine_api import Role, Tokens
from serve.scheduler import Scheduler
from tests.serve.engine_bench import FORM, EngineBench, TracedRunner, Turned
from tests.serve.harness import EOS, make_request, prompt

LAUNCH = 0.001
"""Seconds that the host takes for a launch, less than any step."""


class TimedRunner(TracedRunner):
    """A device under a clock of its own: steps follow each other, each of its cost."""

    def __init__(self, config, cost, **options):
        super().__init__(config, **options)
        self.now, self._free_at, self._cost = 0.0, 0.0, cost
        self._due = deque()
        self.plans = []

    def launch(self, plan, page_table):
        self.now += LAUNCH
        self._free_at = max(self._free_at, self.now) + self._cost(plan)
        self._due.append(self._free_at)
        self.plans.append(plan)
        return super().launch(plan, page_table)

    def fetch(self, pending):
        self.now = max(self.now, self._due.popleft())
        return super().fetch(pending)


class Adaptive(EngineBench):
    """An engine that chooses between no drafts and three."""

    def __init__(self, cost, *, acceptance, ladder=(0, 3)):
        super().__init__(
            acceptance=acceptance, num_pages=512, max_columns=128, drafts=3, num_slots=4
        )
        config = self.scheduler.config
        self.policy = DraftPolicy(ladder, (4,), probe_every=16, probe_steps=4)
        self.runner = TimedRunner(config, cost, acceptance=acceptance)
        self.scheduler = Scheduler(config, self.blocks, eos_ids=EOS, drafting=self.policy)
        self.engine = Turned(
            *("e", Role.IFB, self.scheduler, self.runner, FORM),
            post=self.events.append,
            clock=lambda: self.runner.now,
        )

    def serve(self, count, max_tokens=400, later=0):
        """So many at once, and more while they decode; all to their ends."""
        for i in range(count + later):
            if i >= count:
                self.turn(30)
            options = dict(ignore_eos=True)
            self.engine.submit(make_request(f"r{i}", prompt(5, i), max_tokens, **options))
        self.drain()
        self.check_drained()

    def requests(self):
        """All that were told of."""
        events = [event for told in self.posted(Tokens) for event in told.events]
        return {event.request.id: event.request for event in events}.values()

    def share(self, drafts, steps):
        """How many of the latest steps with four rows had so many drafts."""
        full = [plan for plan in self.runner.plans if len(plan.requests) == 4]
        assert len(full) > 4 * steps
        return sum(plan.drafts == drafts for plan in full[-steps:]) / steps


def cheap(plan):
    """Verifying is nearly free, prompt rows are not."""
    return 0.010 + 0.0005 * plan.drafts + 1.0 * bool(plan.chunks)


def dear(plan):
    """Every verified token costs as much as the first."""
    return 0.010 * (1 + plan.drafts) + 1.0 * bool(plan.chunks)


@pytest.mark.parametrize(
    ("cost", "acceptance", "settled"),
    [(cheap, 0.8, 3), (cheap, 0.03, 0), (dear, 0.8, 0), (dear, 0.1, 0)],
)
def test_an_engine_settles_on_what_pays(cost, acceptance, settled):
    bench = Adaptive(cost, acceptance=acceptance)
    bench.serve(4)
    assert bench.share(settled, 16) == 0.75  # the others are probes


def test_what_is_measured_is_the_time_between_results_of_steps_that_only_decode():
    bench = Adaptive(cheap, acceptance=0.5)
    bench.serve(2, later=2)
    assert sum(bool(plan.chunks) for plan in bench.runner.plans) >= 3
    # Each probe's first step has no drafts to verify and the time of one that has.
    assert bench.policy.speed(4, 0) == pytest.approx(1 / 0.010)
    tested = sum(request.drafted for request in bench.requests())
    rate = sum(request.accepted for request in bench.requests()) / tested
    speed = bench.policy.speed(4, 3)
    assert speed is not None
    assert speed * 0.0115 == pytest.approx(1 + 3 * rate, rel=0.25)  # the rate is a running mean
    assert bench.policy._buckets[0].seconds == pytest.approx([0.010, 0.0115])


def test_an_engine_that_has_no_choice_measures_nothing(monkeypatch):
    def observe(*args):
        raise AssertionError("it was measured")

    monkeypatch.setattr(DraftPolicy, "observe", observe)
    bench = Adaptive(cheap, acceptance=0.5, ladder=(3,))
    bench.serve(4, 60)
    with pytest.raises(AssertionError, match="it was measured"):
        Adaptive(cheap, acceptance=0.5).serve(4, 60)
