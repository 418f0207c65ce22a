"""Open and closed loop against a queue, and the search on top of them, in virtual time."""

import asyncio

import numpy as np
import pytest

from serve.bench.arrivals import offsets
from serve.bench.load import closed_loop, open_loop
from serve.bench.search import Point, find_rate
from serve.bench.summary import Objectives, summarize
from tests.serve.bench.virtual import Queue, run

JOBS = [{"prompt": str(n), "max_tokens": 11} for n in range(8)]


def test_an_open_loop_sends_on_time_whatever_comes_back():
    async def main():
        queue = Queue(slots=1, seconds=10.0)
        notes = {"sent": [], "done": []}
        answers = await open_loop(
            queue.send,
            JOBS,
            np.arange(8) * 0.5,
            sent=lambda: notes["sent"].append(1),
            done=lambda: notes["done"].append(1),
        )
        return queue, answers, notes

    (queue, answers, notes), seconds = run(main())
    assert [at for _, at in queue.seen] == pytest.approx([0.5 * n for n in range(8)])
    assert [job["prompt"] for job, _ in queue.seen] == [str(n) for n in range(8)]
    assert [a.ttft for a in answers] == pytest.approx([9.5 * n for n in range(8)])
    assert seconds == pytest.approx(80) and queue.most == 8
    assert len(notes["sent"]) == len(notes["done"]) == 8


def test_a_client_that_falls_behind_counts_from_the_planned_time():
    async def main():
        queue = Queue(slots=8, seconds=1.0)
        loading = asyncio.create_task(open_loop(queue.send, JOBS[:2], np.array([0.0, 1.0])))
        await asyncio.sleep(0.5)
        asyncio.get_running_loop()._selector.now += 3.0  # the process did not run for 3 seconds
        return await loading

    answers, _ = run(main())
    assert answers[1].sent - answers[1].due == pytest.approx(2.5)
    assert answers[1].ttft == pytest.approx(2.5)


def test_a_closed_loop_keeps_so_many_under_way():
    async def main():
        queue = Queue(slots=8, seconds=2.0)
        return queue, await closed_loop(queue.send, JOBS, 3)

    (queue, answers), seconds = run(main())
    assert queue.most == 3
    assert seconds == pytest.approx(6.0)  # 3 + 3 + 2 of 8
    assert len(answers) == 8 and all(answer.ok for answer in answers)
    assert sorted(answer.sent for answer in answers) == pytest.approx([0] * 3 + [2] * 3 + [4] * 2)
    with pytest.raises(ValueError, match="at least 1"):
        run(closed_loop(queue.send, JOBS, 0))


def test_failures_are_answers_in_their_places():
    async def main():
        queue = Queue(slots=8, seconds=1.0, fail=lambda n: "HTTP 503" if n % 2 else None)
        return await open_loop(queue.send, JOBS, np.arange(8.0))

    answers, _ = run(main())
    assert [answer.error for answer in answers] == [None, "HTTP 503"] * 4


def searched(slots, seconds, *, start, goal, arrivals="constant", **settings):
    """The search's end, and how often it probed."""

    async def probe(rate):
        queue = Queue(slots=slots, seconds=seconds)
        jobs = [{"prompt": "x", "max_tokens": 11}] * 600
        answers = await open_loop(queue.send, jobs, offsets(arrivals, rate, len(jobs), seed=0))
        return Point(rate=rate, met=goal.met(answers), summary=summarize(answers, goal))

    return run(find_rate(probe, start=start, **settings))[0]


@pytest.mark.parametrize("start", [0.1, 4.0, 100.0])
def test_the_search_finds_the_capacity_of_a_queue(start):
    goal = Objectives(ttft=0.2, tpot=0.2, percentile=90.0)
    found = searched(4, 1.0, start=start, goal=goal, tolerance=0.02)  # 4 requests a second
    assert found.bounded and found.best is not None
    assert 4 / 1.025 <= found.best.rate <= 4 * 1.005
    rates = [point.rate for point in found.curve]
    assert rates == sorted(rates) and len(set(rates)) == len(rates)
    assert all(point.met == (point.rate <= found.best.rate) for point in found.curve)
    assert found.best.summary["requests_per_s"] == pytest.approx(found.best.rate, rel=0.02)


def test_random_arrivals_carry_less_than_even_ones():
    goal = Objectives(ttft=0.2, tpot=0.2, percentile=90.0)
    found = searched(4, 1.0, start=1.0, goal=goal, arrivals="poisson")
    assert found.best is not None and 1.5 < found.best.rate < 3.5


def test_a_search_without_a_passing_rate():
    goal = Objectives(ttft=0.2, tpot=0.01, percentile=90.0)  # TPOT is 100 ms at any rate
    found = searched(4, 1.0, start=8.0, goal=goal, most=5)
    assert found.best is None and not found.bounded
    assert [point.rate for point in found.curve] == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_a_search_that_ends_early_returns_what_passed():
    goal = Objectives(ttft=0.2, tpot=0.2, percentile=90.0)
    found = searched(4, 1.0, start=0.5, goal=goal, most=3)
    assert found.best is not None and found.best.rate == 2.0 and not found.bounded


@pytest.mark.parametrize(
    "settings", [{"start": 0.0}, {"tolerance": 0.0}, {"factor": 1.0}, {"most": 0}]
)
def test_a_search_out_of_range(settings):
    async def probe(rate):
        raise AssertionError

    with pytest.raises(ValueError, match="must be positive"):
        run(find_rate(probe, **({"start": 1.0} | settings)))
