"""What fits, how prompts are cut and in which order they run, what a plan promises."""

import dataclasses

import numpy as np
import pytest

from serve.blocks import BlockManager
from serve.errors import OverloadedError
from serve.plan import StepLogprobs, StepResult, TokenLogprob
from serve.request import SamplingOptions
from serve.scheduler import Scheduler
from tests.serve.harness import Harness, long_answer, make_config, make_request, prompt

# ---- what fits


def test_a_request_that_can_never_fit_is_refused():
    scheduler = Harness(make_config(num_pages=8, max_columns=9)).scheduler
    with pytest.raises(ValueError, match=r"30 prompt tokens \+ max_tokens=7 .* 36 tokens: shorten"):
        scheduler.add(make_request("a", prompt(30), 7))
    with pytest.raises(ValueError, match=r"34 tokens need 9 pages and the pool has 8: shorten"):
        scheduler.add(make_request("a", prompt(30), 4))
    scheduler.add(make_request("a", prompt(30), 2))
    with pytest.raises(ValueError, match="'a' is in use"):
        scheduler.add(make_request("a", prompt(3), 2))


def test_the_largest_request_that_fits_uses_the_whole_pool():
    harness = Harness(make_config(num_pages=8, max_columns=8, drafts=3, lookahead=3, tail=2))
    tokens = long_answer(5, 27)
    harness.run("a", tokens, 27)
    assert len(harness.tokens["a"]) == 27
    harness.check_drained()


def test_a_full_queue_refuses():
    scheduler = Harness(make_config(max_waiting=2, max_waiting_tokens=20)).scheduler
    scheduler.add(make_request("a", prompt(25)))  # alone it may be longer than the limit
    with pytest.raises(OverloadedError, match="25 tokens wait already and the prompt has 3"):
        scheduler.add(make_request("b", prompt(3)))
    scheduler.abort("a")
    scheduler.add(make_request("a", prompt(3)))
    scheduler.add(make_request("b", prompt(3)))
    with pytest.raises(OverloadedError, match=r"2 requests wait already \(max_waiting\)"):
        scheduler.add(make_request("c", prompt(3)))
    scheduler.add(make_request("c", prompt(3)), force=True)
    assert scheduler.stats().waiting == 3 and scheduler.stats().waiting_tokens == 9


@pytest.mark.parametrize("name", ["num_pages", "page_size", "lookahead", "tail"])
def test_blocks_of_another_size_are_refused(name):
    sizes = dict(num_pages=32, page_size=4, lookahead=0, tail=0)
    sizes[name] += 1
    blocks = BlockManager(sizes.pop("num_pages"), sizes.pop("page_size"), **sizes)
    with pytest.raises(ValueError, match=f"{name} is"):
        Scheduler(make_config(), blocks)


@pytest.mark.parametrize(
    "change",
    [
        dict(num_slots=0),
        dict(max_chunks=0),
        dict(max_chunk_tokens=0),
        dict(max_wait=-1.0),
        dict(drafts=1, lookahead=2),
        dict(prefill_policy="longest"),
    ],
)
def test_config_is_checked(change):
    with pytest.raises((ValueError, TypeError), match=next(reversed(change))):
        make_config(**change)


# ---- chunks


def test_prefill_covers_all_but_the_last_token_and_decode_follows_in_the_next_plan():
    harness = Harness(make_config(max_prefill_tokens=5))
    request = harness.add("a", prompt(12))
    chunks = []
    for _ in range(4):
        chunks += [(c.start, c.length, c.last) for c in harness.launch().chunks]
        harness.fetch()
    assert chunks == [(0, 5, False), (5, 5, False), (10, 1, True)]
    assert [bool(plan.requests) for plan in harness.plans[:4]] == [False, False, False, True]
    assert [plan.admit for plan in harness.plans[:4]] == [[request], [], [], []]
    assert [plan.columns for plan in harness.plans[:4]] == [2, 3, 3, 3]


def test_max_chunk_tokens_bounds_a_request_not_the_step():
    harness = Harness(make_config(max_prefill_tokens=12, max_chunk_tokens=4))
    for id in "abcd":
        harness.add(id, prompt(9, ord(id)))
    assert [(c.request.id, c.length) for c in harness.launch().chunks] == [
        ("a", 4),
        ("b", 4),
        ("c", 4),
    ]


def test_max_chunks_bounds_the_requests_of_a_step():
    harness = Harness(make_config(max_chunks=2))
    for id in "abc":
        harness.add(id, prompt(3, ord(id)))
    assert len(harness.launch().chunks) == 2


def test_one_token_goes_straight_to_decode():
    harness = Harness(make_config())
    request = harness.add("a", [7])
    plan = harness.launch()
    assert plan.requests == plan.admit == [request] and not plan.chunks
    harness.drain()
    harness.check_drained()


def test_a_whole_prompt_in_the_cache_goes_straight_to_decode():
    harness = Harness(make_config())
    harness.run("a", prompt(12))
    request = harness.add("b", prompt(9))
    plan = harness.launch()
    assert plan.requests == plan.admit == [request] and not plan.chunks and request.hit == 8
    harness.drain()
    assert harness.scheduler.stats().hit_tokens == 8
    assert harness.scheduler.stats().queried_tokens == 21


def test_steps_take_turns_when_not_mixed():
    harness = Harness(make_config(mixed=False, max_prefill_tokens=4))
    harness.add("a", long_answer(4, 12), 12)
    harness.launch()
    harness.add("b", prompt(17, 3))
    for _ in range(7):
        harness.step()
    kinds = ["".join(("P" * bool(p.chunks), "D" * bool(p.requests))) for p in harness.plans]
    assert "".join(kinds[:7]) == "PDPDPDP"
    harness.drain()
    harness.check_drained()


def test_mixed_steps_hold_both():
    harness = Harness(make_config(max_prefill_tokens=4))
    harness.add("a", long_answer(4, 12), 12)
    harness.launch()
    harness.add("b", prompt(17, 3))
    plan = harness.launch()
    assert plan.requests and plan.chunks


# ---- the order of prompts


def order(harness: Harness) -> list[str]:
    return [chunk.request.id for plan in harness.plans for chunk in plan.chunks]


def test_short_prompts_come_first_and_pass_a_long_one_under_way():
    harness = Harness(make_config(max_prefill_tokens=8))
    harness.add("long", prompt(33, 1))
    harness.launch()
    harness.add("middle", prompt(15, 2))
    harness.add("short", prompt(5, 3))
    harness.drain()
    assert order(harness)[:6] == ["long", "short", *["middle"] * 3, "long"]


def test_fcfs_serves_by_arrival():
    harness = Harness(make_config(max_prefill_tokens=8, prefill_policy="fcfs"))
    for id, length in (("long", 33), ("middle", 15), ("short", 5)):
        harness.add(id, prompt(length, length))
    harness.drain()
    served = list(dict.fromkeys(order(harness)))
    assert served == ["long", "middle", "short"]


def test_length_counts_without_what_the_cache_has():
    harness = Harness(make_config(max_prefill_tokens=4))
    harness.run("first", prompt(33))
    harness.plans.clear()
    harness.add("middle", prompt(9, 2))
    harness.add("cached", prompt(36))
    harness.drain()
    assert order(harness)[0] == "cached"


def test_priority_comes_before_length():
    harness = Harness(make_config(max_prefill_tokens=8))
    harness.add("low", prompt(3, 1), priority=1)
    harness.add("high", prompt(30, 2), priority=0)
    harness.drain()
    assert order(harness)[:4] == ["high"] * 4 and order(harness)[4] == "low"


@pytest.mark.parametrize("bound", ["max_skips", "max_wait"])
@pytest.mark.parametrize("under_way", [True, False])
def test_nobody_is_passed_by_beyond_the_bound(bound, under_way):
    limits = {"max_skips": 10**6, "max_wait": 1e9}
    limits[bound] = type(limits[bound])(5)
    harness = Harness(make_config(max_prefill_tokens=8, **limits))
    harness.add("long", prompt(33, 1), 2)
    if under_way:
        harness.step()
    for i in range(40):
        harness.add(f"s{i}", prompt(9, 10 + i), 1)
        harness.step()
    rounds = [
        i
        for i, plan in enumerate(harness.plans)
        if any(c.request.id == "long" for c in plan.chunks)
    ]
    gaps = np.diff([0, *rounds])
    assert len(rounds) == 4 and max(gaps) <= 6, rounds
    assert max(gaps) >= 5, "short requests did not pass it at all"
    harness.drain()


def test_starvation_bound_goes_red_without_promotion(monkeypatch):
    monkeypatch.setattr("serve.queue.WaitingQueue.starved", lambda self, entry, now: False)
    with pytest.raises(AssertionError):
        test_nobody_is_passed_by_beyond_the_bound("max_skips", True)


# ---- contracts


def test_at_most_two_steps_are_launched_ahead():
    harness = Harness(make_config())
    harness.add("a", long_answer(5, 20), 20)
    for _ in range(2):
        assert harness.launch() is not None
    with pytest.raises(AssertionError, match="apply a result first"):
        harness.scheduler.schedule(harness.now)


def test_results_are_applied_in_order():
    harness = Harness(make_config())
    harness.add("a", long_answer(5, 20), 20)
    harness.launch()
    second = harness.launch()
    none = np.zeros(1, np.int32)
    result = StepResult(np.zeros((1, 1), np.int32), none, none, none, none.astype(bool))
    with pytest.raises(AssertionError):
        harness.scheduler.apply(second, result, 0.0)


def test_drafts_are_what_the_rows_ask_for():
    harness = Harness(make_config(drafts=3, lookahead=3, tail=2))
    harness.add("a", long_answer(5, 9), 9, drafts=0)
    harness.drain()
    assert {plan.drafts for plan in harness.plans if plan.requests} == {0}
    harness.add("b", long_answer(6, 9), 9, drafts=2)
    harness.drain()
    assert harness.plans[-1].drafts == 2


def test_same_input_same_plans():
    def plans():
        harness = Harness(make_config(num_pages=14, max_columns=14, drafts=3, lookahead=3, tail=2))
        for i in range(9):
            harness.add(str(i), prompt(3 + 2 * i, i % 4), 12)
        harness.drain()
        return [
            (p.number, [r.id for r in p.requests], p.slots.tolist(), p.columns)
            + tuple((c.request.id, c.start, c.length) for c in p.chunks)
            for p in harness.plans
        ]

    assert plans() == plans()


def test_without_overlap_the_same_answers_come_out():
    config = make_config(num_pages=14, max_columns=14, drafts=3, lookahead=1, tail=0)
    for depth in (1, 2):
        harness = Harness(dataclasses.replace(config), depth=depth)
        for i in range(9):
            harness.add(str(i), prompt(3 + 2 * i, i % 4), 12)
        harness.drain()
        assert len(harness.ends) == 9
        harness.check_drained()


def test_log_probabilities_come_with_every_token_that_asked_for_them():
    scheduler = Harness(make_config(drafts=0)).scheduler
    asking = SamplingOptions(temperature=0.0, logprobs=2)
    scheduler.add(make_request("asks", [5, 6], 5, sampling=asking, ignore_eos=True))
    scheduler.add(make_request("does not", [5, 7], 5, ignore_eos=True))
    told = {"asks": [], "does not": []}
    for step in range(6):
        if (plan := scheduler.schedule(float(step))) is None:
            break
        n = len(plan.requests)
        ones, best = np.ones(n, np.int32), np.arange(20, dtype=np.int32)
        result = StepResult(
            tokens=np.full((n, 1), 9, np.int32),
            count=ones,
            accepted=0 * ones,
            offered=0 * ones,
            finished=np.zeros(n, bool),
            logprobs=StepLogprobs(
                np.full((n, 1), -0.5, np.float32),
                np.broadcast_to(best, (n, 1, 20)),
                np.broadcast_to(-best.astype(np.float32), (n, 1, 20)),
            ),
        )
        for event in scheduler.apply(plan, result, float(step)):
            told[event.request.id].append(event.logprobs)
    assert len(told["asks"]) > 3
    assert all(one == [TokenLogprob(-0.5, [(0, 0.0), (1, -1.0)])] for one in told["asks"])
    assert set(map(bool, told["does not"])) == {False}
