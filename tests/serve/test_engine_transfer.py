"""The two halves of a transfer, as an engine sees each of them."""

import pytest

from serve.engine_api import Held, Installed, Refused, Reserved, Role, Tokens
from serve.request import FinishReason, SamplingOptions, Status
from serve.results import token_logprobs
from tests.serve.engine_bench import EngineBench, part, submit, ticket, wanted
from tests.serve.fake import scores
from tests.serve.harness import EOS, long_answer, make_request, prompt


def test_a_prefill_is_told_once_and_its_pages_stay_until_released():
    bench = EngineBench(Role.PREFILL)
    tokens = prompt(22)
    request = make_request("a#0", tokens)
    request.prefill_only = True
    bench.engine.submit_prefill(request, ticket("a", len(tokens)))
    bench.drain()
    [held] = bench.posted(Held)
    assert (held.request_id, held.tokens, held.finish) == ("a#0", wanted(tokens)[:1], None)
    assert not bench.posted(Tokens)
    # Pushed as soon as the last step was queued, with pages for every row.
    assert bench.link.calls == [("begin", "a#0"), ("complete", "a#0", 6)]
    assert request.status is Status.HELD and bench.scheduler.pages("a#0")
    bench.engine.release("a#0", False)
    bench.drain()
    bench.check_drained()
    submit(bench, "again", tokens)
    bench.drain()
    assert bench.scheduler.stats().hit_tokens == 20  # what it computed is found again


def test_the_pages_are_pushed_before_the_first_token_is_read():
    bench = EngineBench(Role.PREFILL)
    request = make_request("a#0", prompt(6))
    request.prefill_only = True
    bench.engine.submit_prefill(request, ticket("a", 6))
    while ("complete", "a#0", 2) not in bench.link.calls:
        bench.turn()
        assert len(bench.runner.trace) < 9
    assert not bench.posted(Held)
    bench.drain()
    assert bench.posted(Held)


@pytest.mark.parametrize("max_tokens", [1, 8])
def test_a_prefill_that_ends_the_request_says_so(max_tokens):
    bench = EngineBench(Role.PREFILL)
    tokens = prompt(9) if max_tokens == 1 else None
    if tokens is None:  # a prompt that eos follows at once
        tokens = next(p for p in (prompt(5, i) for i in range(200)) if wanted(p) == [EOS[0]])
    request = make_request("a#0", tokens, max_tokens)
    request.prefill_only = True
    bench.engine.submit_prefill(request, ticket("a", len(tokens)))
    bench.drain()
    [held] = bench.posted(Held)
    stopped = max_tokens != 1
    assert held.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert held.stop_token == (EOS[0] if stopped else None)
    bench.check_drained()


def test_a_received_request_goes_on_where_the_other_engine_stopped():
    bench = EngineBench(Role.DECODE, drafts=3)
    tokens = long_answer(22, 8)
    answer = wanted(tokens)
    bench.engine.reserve(make_request("a#0", tokens))
    bench.turn()
    assert bench.posted(Reserved) == [Reserved("e", "a#0", 0)]
    bench.engine.deliver(ticket("a", len(tokens)), part([*tokens, answer[0]], (0, 6)))
    bench.turn()
    assert bench.posted(Installed) == [Installed("e", "a#0", 0, True)]
    assert bench.runner.launched == 0  # nothing runs before it is activated
    bench.engine.activate("a#0", answer[:1])
    bench.drain()
    assert bench.tokens("a#0") == answer[1:]
    bench.check_drained()
    bench.engine.reserve(make_request("b#0", tokens))
    bench.turn()
    hit = bench.posted(Reserved)[-1].hit_tokens
    assert hit > 0 and hit % 4 == 0


@pytest.mark.parametrize("state", ["reserved", "delivered", "activated"])
def test_a_reserved_request_can_be_given_up_in_every_state(state):
    bench = EngineBench(Role.DECODE)
    tokens = long_answer(9, 8)
    answer = wanted(tokens)
    bench.engine.reserve(make_request("a#0", tokens))
    if state != "reserved":
        bench.engine.deliver(ticket("a", 9), part([*tokens, answer[0]], (0, 3)))
    if state == "activated":
        bench.engine.activate("a#0", answer[:1])
    bench.turn(2)
    bench.engine.release("a#0", True)
    bench.engine.deliver(ticket("a", 9), part([*tokens, answer[0]], (0, 3), 1))  # too late
    bench.engine.activate("a#0", answer[:1])
    bench.drain()
    assert bench.posted(Installed)[-1] == Installed("e", "a#0", 1, False)
    bench.check_drained()
    if state == "delivered":
        assert bench.blocks.cached == 0  # what a failed transfer brought is found by nobody


def test_a_reservation_without_room_is_refused():
    bench = EngineBench(Role.DECODE, num_slots=1)
    bench.engine.reserve(make_request("a#0", prompt(5)))
    bench.engine.reserve(make_request("b#0", prompt(5)))
    bench.engine.reserve(make_request("c#0", prompt(60), 60))
    bench.drain()
    no_room, never = bench.posted(Refused)
    assert (no_room.request_id, no_room.permanent) == ("b#0", False)
    assert (never.request_id, never.permanent) == ("c#0", True) and "60" in never.why
    bench.engine.release("a#0", False)
    bench.engine.reserve(make_request("b#0", prompt(5)))
    bench.drain()
    assert [event.request_id for event in bench.posted(Reserved)] == ["a#0", "b#0"]


@pytest.mark.parametrize("length", [1, 22])
@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_a_prefill_tells_what_was_asked_about_the_prompt(max_tokens, length):
    bench = EngineBench(Role.PREFILL)
    tokens = long_answer(length, max_tokens)
    options = SamplingOptions(prompt_logprobs=2)
    request = make_request("a#0", tokens, max_tokens, sampling=options, prefill_only=True)
    bench.engine.submit_prefill(request, ticket("a", length))
    bench.drain()
    [held] = bench.posted(Held)
    assert held.tokens == wanted(tokens, max_tokens)[:1]
    assert held.finish is (FinishReason.LENGTH if max_tokens < 2 else None)
    assert held.prompt_logprobs == token_logprobs(scores(tokens, 0, length - 1), 2)
    event = held.event(request)
    assert event.prompt_logprobs is held.prompt_logprobs and event.finish is held.finish
    assert [call for call in bench.link.calls if call[0] == "complete"] == (
        [("complete", "a#0", -(-length // 4))] if max_tokens else []
    )
    bench.engine.release("a#0", False)
    bench.drain()
    bench.check_drained()
    assert ("drop", "a#0") in bench.link.calls
