"""A whole server under load says what the model says alone, and keeps nothing of it.

HTTP, text, coordinator, scheduler, prefix cache, preemption, drafts, stops and clients that leave,
all at once, against `dskjax.decode.generate` one prompt at a time.
"""

import threading
import time

import psutil
import pytest

from serve.request import FinishReason
from tests.serve.http_stack import LETTERS, Wish, alone, serving, tight, wishes


@pytest.fixture(scope="module")
def stack():
    with serving(tight()) as stack:
        yield stack


def check(asked, replies):
    """Every text is right, to its end or to where the client left."""
    for wish, reply in zip(asked, replies, strict=True):
        text, finish = wish.expected()
        if wish.leave_after is not None:
            assert text.startswith(reply.text), (wish, reply)
            continue
        assert (reply.text, reply.finish) == (text, finish), (wish, reply)
        assert reply.usage["prompt_tokens"] == len(wish.prompt)
    assert any(wish.leave_after is None for wish in asked)


def accepted(replies):
    return sum(
        reply.usage["completion_tokens_details"]["accepted_prediction_tokens"]
        for reply in replies
        if reply.usage
    )


def test_texts_under_load_are_those_of_generate(stack):
    asked = wishes(64)
    before = len(stack.coordinator.history)
    replies = stack.ask_all(asked, at_once=64)
    check(asked, replies)
    stack.assert_empty()
    # Everything that could have gone wrong did happen:
    stats = stack.engines[0].scheduler.stats()
    assert stats.preemptions > 0 and stats.hit_tokens > 0 and accepted(replies) > 0
    ends = [summary.finish for summary in stack.coordinator.history][before:]
    assert len(ends) == 64
    assert ends.count(FinishReason.ABORT) > 0 and ends.count(FinishReason.ERROR) == 0
    assert {reply.finish for reply in replies} == {"stop", "length", None}
    cut = [wish for wish in asked if wish.stop and wish.expected()[1] == "stop"]
    assert cut and len({wish.speculate for wish in asked}) == 3


def test_the_check_sees_a_wrong_letter(stack):
    wish = Wish(prompt=(1, 2, 3), max_tokens=8)
    [reply] = stack.ask_all([wish], at_once=1)
    check([wish], [reply])
    reply.text = reply.text[:-1] + LETTERS[(LETTERS.index(reply.text[-1]) + 1) % 5]
    with pytest.raises(AssertionError):
        check([wish], [reply])


def test_a_prompt_that_was_seen_is_found(stack):
    wish = Wish(prompt=(4, 4, 3, 2, 1, 0) * 4, max_tokens=4)
    first, second = (stack.ask_all([wish], at_once=1)[0] for _ in range(2))
    assert first.text == second.text == "".join(LETTERS[id] for id in alone(wish.prompt)[:4])
    cached = second.usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > first.usage["prompt_tokens_details"]["cached_tokens"] and cached % 4 == 0


def soak(stack, count, **options):
    """Serves in rounds; memory and threads after the first rounds are those at the end."""
    process, rounds = psutil.Process(), 10
    sizes, threads = [], []
    for number in range(rounds):
        asked = wishes(count // rounds, seed=1 + number, **options)
        check(asked, stack.ask_all(asked, at_once=64))
        stack.assert_empty()
        sizes.append(process.memory_info().rss / 2**20)
        threads.append(threading.active_count())
    print(f"soak of {count}: MiB {[round(size) for size in sizes]}, threads {threads}")
    return sizes, threads


def check_growth(sizes, threads, *, mib):
    assert sizes[-1] - sizes[len(sizes) // 2 - 1] < mib, sizes
    assert max(threads[3:]) <= max(threads[:3]), threads


def test_soak(stack):
    begun = time.monotonic()
    check_growth(*soak(stack, 500, longest=6), mib=16)
    print(f"500 requests in {time.monotonic() - begun:.1f} s")


@pytest.mark.full
def test_long_soak(stack):
    check_growth(*soak(stack, 5000), mib=16)
