"""Requests whose cache another engine sends, behind a scheduler of several ranks."""

import random

import pytest

from serve.rank_scheduler import RankScheduler
from serve.request import Status
from tests.serve.fake import continuation
from tests.serve.harness import EOS, long_answer, make_request, prompt
from tests.serve.rank_bench import Devices, make

MTP = dict(drafts=2, lookahead=2, tail=1)


def reserve(scheduler, id, tokens, max_tokens=6):
    request = make_request(id, tokens, max_tokens)
    return request, scheduler.reserve(request)


def test_reservations_spread_over_ranks_and_a_full_rank_makes_the_next_one_wait():
    scheduler = make(ranks=3, num_slots=2, num_pages=12, **MTP)
    devices, asked = Devices(scheduler), []
    for i in range(6):
        request, hit = reserve(scheduler, f"r{i}", long_answer(9 + i, 6))
        assert hit == 0
        asked.append(request)
    assert sorted(scheduler.rank_of(request.id) for request in asked) == [0, 0, 1, 1, 2, 2]
    late, hit = reserve(scheduler, "late", prompt(5))
    assert hit is None and late.status is Status.WAITING and scheduler.find("late") is None
    home = scheduler.rank_of("r3")
    scheduler.release("r3")
    assert scheduler.reserve(late) == 0 and scheduler.rank_of("late") == home
    scheduler.release("late")
    for request in asked:
        if request.id != "r3":
            devices.receive(request, 0)
    devices.drain()
    devices.check()
    for request in asked:
        if request.id != "r3":
            wanted = continuation(request.tokens[: request.prompt_len], request.stop, EOS)[0]
            assert devices.tokens[request.id] == wanted


def test_a_rank_that_cannot_take_a_request_leaves_it_to_the_next():
    scheduler = make(ranks=2)
    scheduler.ranks[1].add(make_request("a", prompt(24)))
    scheduler.ranks[0]._residents.stalled = True  # somebody who decodes there waits for pages
    request, hit = reserve(scheduler, "b", prompt(5))
    assert hit == 0 and scheduler.rank_of("b") == 1
    assert scheduler.release("b") is request
    assert not any(rank._refused for rank in scheduler.ranks), "a refusal is remembered for ever"


def free_after(scheduler, devices, end):
    """Pages that each rank got back when `end` was called."""
    before = devices.free()
    end()
    devices.check()
    return [new - old for new, old in zip(devices.free(), before, strict=True)]


@pytest.mark.parametrize("end", ["release", "failed", "abort"])
def test_an_end_gives_back_pages_of_its_rank_and_of_no_other(end):
    scheduler = make(ranks=3, num_slots=2, num_pages=8)
    devices = Devices(scheduler)
    held = {}
    for i in range(3):
        request, _ = reserve(scheduler, f"r{i}", prompt(8 + i, i))
        held[request.id] = (scheduler.rank_of(request.id), len(scheduler.pages(request.id)))
    for id, (rank, pages) in held.items():
        ends = {
            "release": lambda id=id: scheduler.release(id),
            "failed": lambda id=id: scheduler.release(id, failed=True),
            "abort": lambda id=id: scheduler.abort(id),
        }
        assert free_after(scheduler, devices, ends[end]) == [
            pages if at == rank else 0 for at in range(3)
        ]


def test_prefills_are_held_on_their_ranks_until_they_are_released():
    scheduler = make(ranks=2, **MTP)
    devices = Devices(scheduler)
    for i in range(4):
        tokens = long_answer(6 + i, 8)
        scheduler.add(make_request(f"r{i}", tokens, 8, prefill_only=True))
    while devices.step():
        pass
    assert scheduler.stats().held == 4 and not scheduler.idle
    assert all(len(tokens) == 1 for tokens in devices.tokens.values())
    homes = {f"r{i}": scheduler.rank_of(f"r{i}") for i in range(4)}
    assert sorted(homes.values()) == [0, 0, 1, 1]
    for id, home in homes.items():
        pages = len(scheduler.pages(id))
        assert pages and free_after(scheduler, devices, lambda id=id: scheduler.release(id)) == [
            pages if at == home else 0 for at in range(2)
        ]
    assert scheduler.idle


# ------------------------------------------------------------------ anything, at random


class Life:
    """Requests that come, by themselves and from another engine, run and are given up at random."""

    def __init__(self, seed: int, kind: type[RankScheduler] = RankScheduler):
        self.random = random.Random(seed)
        sizes = dict(num_slots=3, num_pages=12, max_columns=8, reserve_tokens=2)
        self.scheduler = make(ranks=3, kind=kind, **sizes, **MTP)
        self.devices = Devices(self.scheduler)
        self.asked, self.hits, self.homes = {}, {}, {}
        self.refused, self.given_up = [], set()

    def event(self) -> None:
        """One thing happens, and every rank's books balance after it."""
        what = self.random.choice(
            (self.add, self.reserve, self.reserve, self.deliver, self.deliver, self.give_up)
            + (self.step,) * 6
        )
        what()
        self.devices.check()
        for id, home in self.homes.items():
            assert self.scheduler.rank_of(id) in (None, home), f"{id} moved"

    def make(self):
        id = f"r{len(self.asked)}"
        length, answer = self.random.randint(1, 16), self.random.randint(2, 12)
        tokens = prompt(length, self.random.randint(0, 3))  # few, so that prefixes are shared
        self.asked[id] = make_request(id, tokens, answer, ignore_eos=True)
        return self.asked[id]

    def add(self) -> None:
        request = self.make()
        self.scheduler.add(request)
        self.homes[request.id] = self.scheduler.rank_of(request.id)

    def reserve(self) -> None:
        request = self.refused.pop(0) if self.refused else self.make()
        before = self.devices.free()
        hit = self.scheduler.reserve(request)
        took = [old - new for old, new in zip(before, self.devices.free(), strict=True)]
        if hit is None:
            self.refused.append(request)
            assert not any(took), "a refusal took pages"
            return
        home = self.homes[request.id] = self.scheduler.rank_of(request.id)
        self.hits[request.id] = hit
        assert not any(pages for at, pages in enumerate(took) if at != home), took

    def deliver(self) -> None:
        if self.hits:
            id = self.random.choice(list(self.hits))
            self.devices.receive(self.asked[id], self.hits.pop(id))

    def give_up(self) -> None:
        here = self.scheduler.requests
        if not here or self.random.random() < 0.5:
            return
        request = self.random.choice(here)
        others = [free for at, free in enumerate(self.devices.free()) if at != self.home(request)]
        if request.status is Status.RECEIVING:
            self.scheduler.release(request.id, failed=self.random.random() < 0.5)
            self.hits.pop(request.id, None)
        else:
            self.scheduler.abort(request.id)
        left = [free for at, free in enumerate(self.devices.free()) if at != self.home(request)]
        assert left == others, "pages of another rank came free"
        self.given_up.add(request.id)

    def home(self, request) -> int:
        return self.homes[request.id]

    def step(self) -> None:
        self.devices.step()

    def run(self, events: int) -> None:
        for _ in range(events):
            self.event()
        while self.hits or self.refused:
            if self.refused:
                self.reserve()
            self.deliver()
            self.devices.step()
        self.devices.drain()
        self.devices.check()
        assert self.devices.free() == [12, 12, 12], self.devices.free()
        for id, request in self.asked.items():
            if id not in self.given_up:
                wanted = continuation(request.tokens[: request.prompt_len], request.stop, EOS)[0]
                assert self.devices.tokens[id] == wanted, id
        used = [list(self.homes.values()).count(at) for at in range(3)]
        assert min(used) > len(self.homes) // 5, f"requests by rank: {used}"


@pytest.mark.parametrize("seed", range(3))
def test_no_rank_loses_a_page_whatever_happens(seed):
    life = Life(seed)
    life.run(200)
    stats = life.scheduler.stats()
    assert life.given_up and stats.preemptions and stats.hit_tokens, stats


class ReleasesElsewhere(RankScheduler):
    """Gives the pages of another rank's request back."""

    def release(self, request_id, *, failed=False):
        at = self.rank_of(request_id)
        rank = self.ranks[(at + 1) % len(self.ranks)]
        other = next((r for r in rank.requests if r.status is Status.RECEIVING), None)
        return rank.release(other.id) if other else super().release(request_id, failed=failed)


class CountsPagesOverAllRanks(RankScheduler):
    """Has the pages of a rank begin where those of the one before it end."""

    def pages(self, request_id):
        first = self.rank_of(request_id) * self.ranks[0].config.num_pages
        return [(first + page) % 11 for page in super().pages(request_id)]


class NoBalance(RankScheduler):
    """Always asks the first rank first."""

    def add(self, request, now=None, *, force=False):
        self.ranks[0].add(request, now, force=force)

    def reserve(self, request, now=None):
        return self.ranks[0].reserve(request, now)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ReleasesElsewhere, "pages of another rank"),
        (CountsPagesOverAllRanks, "reads"),
        (NoBalance, "requests by rank"),
    ],
)
def test_the_random_events_see_planted_bugs(kind, said):
    with pytest.raises(AssertionError, match=said):
        Life(0, kind).run(200)
