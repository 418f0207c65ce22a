"""Ranks whose queues differ launch the same programs in the same order, whatever happens on each.

Each rank is a program of its own that stops at every collective: where all say what they need, and
at every launch. The world goes on only if all of them stand at the same one; where they do not,
GPUs would wait for each other for ever.
"""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.agree import Sizes, agree
from serve.buckets import Bucket, Buckets, Variant
from serve.rank_scheduler import Member
from tests.serve.harness import Harness, make_config, prompt

ROOT = Path(__file__).parents[2]
RANKS, STEPS, DRAFTS = 3, 10_000, 2
BUCKETS = Buckets(
    batches=(1, 3),
    chunk_shapes=((1, 8), (2, 3)),
    drafts=tuple(range(DRAFTS + 1)),
    columns=(4, 10),
    mixed=True,
    variants=(Variant.PLAIN, Variant.FULL),
)
PACES = (0.0, 0.02, 0.15, 0.6)
"""Chances that a request comes before a step; each rank goes from one to another."""


class Rank:
    """A rank with requests of its own, which come and go at random.

    Attributes:
        counts: what happened on it.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        sizes = dict(num_slots=3, num_pages=14, page_size=3, max_columns=10, max_prefill_tokens=8)
        mtp = dict(drafts=DRAFTS, lookahead=DRAFTS, tail=DRAFTS - 1)
        self.harness = Harness(make_config(**sizes, **mtp, max_chunks=3, reserve_tokens=2))
        self.member = Member(
            self.harness.scheduler,
            BUCKETS,
            lambda request: Variant.FULL if request.stop.min_tokens else Variant.PLAIN,
        )
        self.counts: Counter[str] = Counter()
        self.pace = 0.0

    def live(self, steps: int) -> Iterator:
        """Steps until `steps` are done and nothing is left; yields at each collective."""
        done = empty = 0
        while done < steps or empty < 2:
            if done < steps:
                self.happen()
            told = yield self.propose()
            sizes = self.decide(told)
            yield from (("launch", bucket) for bucket in self.programs(sizes))
            self.step(sizes)
            done, empty = done + 1, empty + 1 if sizes.empty else 0

    def happen(self) -> None:
        """What clients of this rank do between two steps."""
        draw, harness = self.random, self.harness
        if draw.random() < 0.01:
            self.pace = draw.choice(PACES)
        waiting = harness.scheduler.stats().waiting
        if draw.random() < self.pace and waiting < 6:
            id, length = f"r{len(harness.tokens)}", draw.randint(1, 12)
            options = dict(drafts=draw.choice((None, None, 0, 1)))
            if draw.random() < 0.2:
                options["min_tokens"] = 2
            harness.add(id, prompt(length, draw.randint(0, 4)), draw.randint(2, 16), **options)
            self.counts["requests"] += 1
        here = harness.scheduler.requests
        if here and draw.random() < 0.02:
            harness.scheduler.abort(draw.choice(here).id)
            self.counts["aborts"] += 1

    def propose(self) -> tuple[str, Sizes]:
        self.harness.now += 1.0
        return "agree", self.member.propose(self.harness.now)

    def decide(self, told: list[Sizes]) -> Sizes:
        return agree(told)

    def programs(self, sizes: Sizes) -> list[Bucket]:
        return [] if sizes.empty else sizes.programs(BUCKETS)

    def step(self, sizes: Sizes) -> None:
        """Launches the rank's part and takes in what the step before did."""
        plan, harness = self.member.adopt(sizes), self.harness
        before = len(harness.launched)
        if plan is not None:
            assert len(plan.requests) <= sizes.rows and plan.columns <= sizes.columns
            harness._check_writes(plan)
            pending = harness.runner.launch(plan, harness.scheduler.page_table)
            harness.launched.append((plan, pending))
        elif not sizes.empty:
            self.counts["idle"] += 1
        if before:
            harness.fetch()  # and checks what it brought against what the request says alone


def simulate(ranks: list[Rank], steps: int) -> Counter:
    """Runs ranks to their ends; counts collectives by kind.

    Raises:
        AssertionError: they do not stand at the same collective.
    """
    lives = [rank.live(steps) for rank in ranks]
    at, kinds = [next(life, None) for life in lives], Counter()
    while any(at):
        assert all(at), f"some ranks are done, others stand at {at}"
        kind = {what for what, _ in at}
        assert len(kind) == 1, f"ranks stand at different collectives: {at}"
        said = [value for _, value in at]
        if kind == {"launch"}:
            assert len(set(said)) == 1, f"ranks launch different programs: {said}"
            kinds[str(said[0])] += 1
        else:
            kinds["agree"] += 1
            kinds["nothing to do"] += agree(said).empty
        at = [_send(life, said) for life in lives]
    return kinds


def _send(life, said):
    try:
        return life.send(said)
    except StopIteration:
        return None


def live_and_check() -> None:
    ranks = [Rank(seed) for seed in range(RANKS)]
    kinds = simulate(ranks, STEPS)
    for rank in ranks:
        rank.harness.check_drained()
        told, ends = len(rank.harness.tokens), len(rank.harness.ends)
        assert told == ends + rank.counts["aborts"], "a request was lost"
    # Everything that could have driven them apart did happen, on every rank:
    assert kinds["agree"] >= STEPS and kinds["nothing to do"] > 20, kinds
    assert len(kinds) > 20, kinds
    for rank in ranks:
        counts, stats = rank.counts, rank.harness.scheduler.stats()
        assert counts["requests"] > 200 and counts["aborts"] > 20 and counts["idle"] > 200, counts
        assert stats.preemptions > 20, stats


def test_ranks_stay_in_step_for_ten_thousand_steps():
    # In a process of its own: without the run-time type checks of the tests, a fifth of the time.
    command = [sys.executable, "-m", "tests.serve.test_ranks_in_step"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class Sleeper(Rank):
    """Leaves a step out when it has nothing to do itself."""

    def programs(self, sizes):
        return super().programs(sizes) if self.member._plan is not None else []


class Loner(Rank):
    """Launches what it needs itself."""

    def decide(self, told):
        return self.own

    def propose(self):
        kind, self.own = super().propose()
        return kind, self.own


class Quiet(Rank):
    """Does not take part in the agreement while nobody asks it for anything."""

    def live(self, steps):
        life = super().live(steps)
        call = next(life, None)
        while call is not None:
            alone = call[0] == "agree" and call[1].empty
            call = _send(life, [call[1]] if alone else (yield call))


@pytest.mark.parametrize("wrong", [Sleeper, Loner, Quiet])
def test_a_rank_that_decides_for_itself_is_caught(wrong):
    ranks = [Rank(0), wrong(1)]
    with pytest.raises(AssertionError, match=r"ranks (stand at|launch) different|are done"):
        simulate(ranks, 300)


if __name__ == "__main__":
    live_and_check()
