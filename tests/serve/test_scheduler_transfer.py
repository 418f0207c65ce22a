"""Prefill and decode on different engines, and aborts in every state."""

import pytest

from serve.request import Status
from serve.scheduler import Scheduler
from tests.serve.fake import continuation
from tests.serve.harness import EOS, Harness, long_answer, make_config, make_request, prompt

# ---- prefill and decode on different engines


def test_a_prefill_only_request_decodes_once_and_is_held_until_released():
    harness = Harness(make_config(drafts=2, lookahead=2, tail=1))
    tokens = long_answer(10, 9)
    request = harness.add("a", tokens, 9, prefill_only=True)
    harness.drain()
    assert request.status is Status.HELD and request.emitted == 1 and harness.ends == {}
    assert sum(request in plan.requests for plan in harness.plans) == 1
    assert not harness.scheduler.idle and harness.scheduler.stats().held == 1
    assert (
        harness.scheduler.pages("a")[:3] == harness.scheduler.page_table[request.slot, :3].tolist()
    )
    assert harness.scheduler.release("a") is request and harness.scheduler.release("a") is None
    harness.check_drained()


def test_a_prefill_only_request_that_ends_with_its_first_token_is_not_held():
    harness = Harness(make_config())
    request = harness.run("a", prompt(6), 1, prefill_only=True)
    assert request.status is Status.FINISHED
    harness.check_drained()


def receive(harness: Harness, id: str, tokens: list[int], max_tokens: int, **options):
    request = make_request(id, tokens, max_tokens, arrival=harness.now, **options)
    harness.tokens[id] = []
    return request, harness.scheduler.reserve(request)


def deliver(harness: Harness, request, hit: int) -> None:
    first = continuation(request.tokens, request.stop, EOS)[0][:1]
    pages = harness.scheduler.pages(request.id)
    harness.runner.receive([*request.tokens, *first], pages, hit, request.id)
    harness.scheduler.start_received(request.id, first)
    harness.tokens[request.id] += first


def test_a_received_request_decodes_from_the_next_plan_and_its_pages_are_shared():
    harness = Harness(make_config(drafts=2, lookahead=2, tail=1))
    tokens = long_answer(11, 9)
    request, hit = receive(harness, "a", tokens, 9)
    assert hit == 0 and request.status is Status.RECEIVING
    assert harness.launch() is None and harness.scheduler.stats().receiving == 1
    deliver(harness, request, hit)
    plan = harness.launch()
    assert plan.requests == plan.admit == [request] and not plan.chunks
    harness.drain()
    again, hit = receive(harness, "b", tokens, 9)
    assert hit == 8 and again.hit == 8
    harness.scheduler.release("b")
    harness.check_drained()


def test_what_a_failed_transfer_brought_is_never_shared():
    harness = Harness(make_config())
    tokens = long_answer(11, 9)
    request, _ = receive(harness, "a", tokens, 9)
    assert harness.scheduler.release("a", failed=True) is request
    harness.check_drained()
    request, hit = receive(harness, "b", tokens, 9)
    assert hit == 0
    deliver(harness, request, hit)
    assert harness.blocks.match(tokens)
    assert harness.scheduler.abort("b", spoiled=True) is request
    assert harness.blocks.match(tokens) == []
    harness.check_drained()


def test_the_test_of_failed_transfers_sees_their_rows_published(monkeypatch):
    def release(self, request_id, *, failed=False):
        request = self._residents.entries[request_id].request
        self._table.seal(request.slot, len(request.tokens))
        return self.abort(request_id)

    monkeypatch.setattr(Scheduler, "release", release)
    with pytest.raises(AssertionError, match="assert 8 == 0"):
        test_what_a_failed_transfer_brought_is_never_shared()


def test_reserve_answers_none_without_room_and_keeps_the_reserve():
    harness = Harness(make_config(num_pages=8, max_columns=8, reserve_tokens=8))
    a, hit = receive(harness, "a", long_answer(8, 20), 20)
    b, none = receive(harness, "b", [60, *long_answer(12, 10)], 10)
    assert hit == 0 and none is None and b.slot == -1
    deliver(harness, a, hit)
    harness.drain()
    assert harness.scheduler.reserve(b) == 0
    deliver(harness, b, 0)
    harness.drain()
    harness.check_drained()
    with pytest.raises(ValueError, match="longest sequence"):
        receive(harness, "c", prompt(30), 30)


def test_only_what_is_received_can_be_started_and_only_with_one_token():
    harness = Harness(make_config())
    with pytest.raises(KeyError):
        harness.scheduler.start_received("a", [1])
    receive(harness, "a", prompt(5), 4)
    for tokens in ([], [1, 2]):
        with pytest.raises(ValueError, match=f"got {len(tokens)} tokens"):
            harness.scheduler.start_received("a", tokens)
    harness.scheduler.start_received("a", [1])
    with pytest.raises(ValueError, match="not RECEIVING"):
        harness.scheduler.start_received("a", [1])
    with pytest.raises(ValueError, match="neither HELD nor RECEIVING"):
        harness.scheduler.release("a")


def test_a_preempted_request_goes_before_new_transfers():
    harness = Harness(make_config(num_pages=10, max_columns=10, reserve_tokens=0))
    harness.add("a", long_answer(4, 30), 30)
    b = harness.add("b", long_answer(5, 30), 30)
    while b.slot >= 0 or b.admissions == 0:
        harness.step()
    assert receive(harness, "c", [3], 2)[1] is None
    harness.drain()
    assert receive(harness, "d", [3], 2)[1] == 0


# ---- abort


@pytest.mark.parametrize("state", [s for s in Status if s is not Status.FINISHED])
def test_abort_works_in_every_state(state):
    harness = Harness(make_config(max_prefill_tokens=4))
    tokens = long_answer(14, 9)
    if state is Status.RECEIVING:
        receive(harness, "a", tokens, 9)
    else:
        harness.add("a", tokens, 9, prefill_only=state is Status.HELD)
    request = harness.scheduler.requests[0]
    while request.status is not state:
        harness.step()
    assert harness.scheduler.abort("a") is request and request.status is Status.FINISHED
    assert harness.scheduler.requests == []
    harness.check()
    harness.drain()
    harness.check_drained()
    harness.run("a", tokens, 9)


def test_abort_of_a_preempted_request_under_way_does_not_bring_it_back():
    harness = Harness(make_config(num_pages=10, max_columns=10, reserve_tokens=0))
    harness.add("a", long_answer(4, 30), 30)
    b = harness.add("b", long_answer(5, 30), 30)
    while harness.scheduler.stats().preemptions == 0:
        harness.step()
    assert harness.scheduler.stats().waiting == 1
    assert harness.scheduler.abort("b") is b and harness.scheduler.stats().waiting == 0
    harness.drain()
    harness.check_drained()
    assert "b" not in harness.ends
