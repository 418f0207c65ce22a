"""The loop of an engine on a fake device: order, overlap, ends, failures."""

import gc
import sys
import threading
import time

import pytest

from serve.attempts import CoordinatorConfig
from serve.coordinator import Coordinator, Mailbox
from serve.engine import Engine, settle_process
from serve.engine_api import (
    EngineFailed,
    EngineReady,
    Role,
    Tokens,
)
from serve.request import FinishReason, SamplingOptions, Status
from tests.serve.engine_bench import FORM, EngineBench, submit, wanted
from tests.serve.harness import long_answer, make_request, prompt
from tests.serve.stack import until

# ------------------------------------------------------------------ steps


def test_a_step_is_launched_before_the_one_before_it_is_read():
    bench = EngineBench()
    submit(bench, "a", long_answer(4, 12), 12)
    bench.drain()
    trace = bench.runner.trace
    steps = len(trace) // 2
    assert steps >= 13
    between = [("launch", n + 1) for n in range(steps - 1)]
    assert trace[0] == ("launch", 0) and trace[-1] == ("fetch", steps - 1)
    assert trace[1:-1] == [
        entry for n, launch in enumerate(between) for entry in (launch, ("fetch", n))
    ]
    bench.check_drained()


def test_what_a_result_brought_is_told_after_the_next_launch():
    """Whoever makes text of it must not keep the interpreter from the launch."""
    bench = EngineBench()
    bench.engine._post = lambda event: bench.runner.trace.append(("tell", event.events))
    submit(bench, "a", long_answer(1, 4), 4)
    bench.drain()
    kinds = [kind for kind, _ in bench.runner.trace]
    assert kinds[:8] == ["launch", "launch", "fetch", "launch", "tell", "fetch", "launch", "tell"]
    assert kinds.count("tell") == 4 and bench.scheduler.idle


@pytest.mark.parametrize("drafts", [0, 3])
def test_answers_are_complete_and_in_order(drafts):
    bench = EngineBench(drafts=drafts, num_pages=20)  # so few that some give way
    asked = {f"r{i}": prompt(3 + 5 * i, i) for i in range(6)}
    for id, tokens in asked.items():
        submit(bench, id, tokens, 20)
    bench.drain()
    for id, tokens in asked.items():
        assert bench.tokens(id) == wanted(tokens, 20)
        assert [event.finish is not None for event in bench.of(id)][:-1] == [False] * (
            len(bench.of(id)) - 1
        )
        assert bench.of(id)[-1].finish is not None
    assert bench.scheduler.stats().preemptions
    bench.check_drained()


def test_results_are_told_once_a_step():
    bench = EngineBench()
    for i in range(4):
        submit(bench, str(i), long_answer(3, 6), 6)
    bench.drain()
    told = bench.posted(Tokens)
    assert max(len(event.events) for event in told) == 4
    assert len(told) <= bench.runner.fetched


# ------------------------------------------------------------------ commands


def states():
    """A bench with one request in each state that an engine's own requests have."""
    bench = EngineBench(num_slots=2)
    submit(bench, "running", long_answer(3, 12), 12)
    bench.turn(4)
    submit(bench, "prefill", prompt(60, 2), 4)
    bench.turn()
    submit(bench, "waiting", prompt(5, 3))
    bench.turn()
    found = {request.id: request.status for request in bench.scheduler.requests}
    assert found == {
        "running": Status.RUNNING,
        "prefill": Status.PREFILL,
        "waiting": Status.WAITING,
    }
    return bench


@pytest.mark.parametrize("how", ["abort", "finish", "release"])
@pytest.mark.parametrize("id", ["running", "prefill", "waiting", "unknown"])
def test_a_request_can_be_ended_in_every_state(id, how):
    bench = states()
    options = {"abort": (), "finish": (FinishReason.STOP,), "release": (True,)}[how]
    getattr(bench.engine, how)(id, *options)
    bench.turn()
    seen = len(bench.of(id))
    bench.drain()
    assert len(bench.of(id)) == seen, "an event after the end"
    assert all(event.finish is None for event in bench.of(id))
    for other in {"running", "prefill", "waiting"} - {id}:
        assert bench.of(other)[-1].finish is not None
    bench.check_drained()
    getattr(bench.engine, how)(id, *options)  # again, now that nobody knows it
    bench.drain()
    bench.check_drained()


def test_a_finished_answer_counts_for_the_mean_length_and_an_aborted_does_not():
    lengths = []
    for how in ("finish", "abort"):
        bench = EngineBench()
        submit(bench, "a", long_answer(3, 12), 12)
        bench.turn(6)
        args = (FinishReason.STOP,) if how == "finish" else ()
        getattr(bench.engine, how)("a", *args)
        bench.drain()
        lengths.append(bench.engine._snapshot().mean_output)
    assert lengths[0] > 0 and lengths[1] == 0


def test_commands_take_effect_in_the_order_of_the_calls():
    bench = EngineBench()
    tokens = prompt(5)
    submit(bench, "a", prompt(9, 4))
    bench.engine.abort("a")
    second = submit(bench, "a", tokens)
    bench.engine.abort("b")  # before it came
    submit(bench, "b", tokens)
    bench.drain()
    assert bench.tokens("a") == bench.tokens("b") == wanted(tokens)
    assert {event.request for event in bench.of("a")} == {second}
    bench.check_drained()


def test_what_cannot_be_served_is_told_as_an_error():
    bench = EngineBench(max_waiting=1, num_slots=1)
    submit(bench, "long", prompt(60), 60)
    submit(bench, "first", prompt(5))
    submit(bench, "second", prompt(6))
    bench.drain()
    for id, words in (("long", "60 prompt tokens"), ("second", "requests wait already")):
        [event] = bench.of(id)
        assert event.finish is FinishReason.ERROR and words in event.message, event
    assert bench.tokens("first") == wanted(prompt(5))
    assert {("drop", "long"), ("drop", "second")} <= set(bench.link.calls)
    bench.check_drained()


def test_validation_asks_scheduler_and_runner():
    bench = EngineBench()
    bench.engine.validate(make_request("a", prompt(5)))
    with pytest.raises(ValueError, match="60 prompt tokens"):
        bench.engine.validate(make_request("a", prompt(60), 60))
    bench.runner.refuse = ValueError("no such rule")
    with pytest.raises(ValueError, match="no such rule"):
        bench.engine.validate(make_request("a", prompt(5)))


def test_the_load_is_that_of_the_scheduler():
    bench = states()
    load, stats = bench.engine._snapshot(), bench.scheduler.stats()
    assert load.running == 2 and load.waiting == 1 and load.slots == 2
    assert load.waiting_tokens == stats.waiting_tokens and load.total_pages == 32
    assert load.free_pages == stats.free_pages < 32 and load.page_size == 4
    running = bench.scheduler.find("running")
    assert running is not None and load.generated == (running.emitted,)
    assert load.tpot > 0
    bench.drain()
    assert bench.engine._snapshot().generated == ()
    bench.engine._load_at = -1.0
    bench.turn()
    assert bench.engine.load() == bench.engine._snapshot()


# ------------------------------------------------------------------ the thread


@pytest.fixture
def running():
    """Makes engines with a thread."""
    started = []

    def start(bench):
        own = Engine("e", Role.IFB, bench.scheduler, bench.runner, FORM, post=bench.events.append)
        own.start()
        started.append((own, bench))
        return own

    yield start
    for engine, bench in started:
        if bench.runner.hold is not None:
            bench.runner.hold.set()
        engine.stop()


def test_a_thread_serves_and_stops(running):
    bench = EngineBench()
    engine = running(bench)
    tokens = long_answer(5, 8)
    engine.submit(make_request("a", tokens))
    until(lambda: bench.of("a") and bench.of("a")[-1].finish)
    assert bench.tokens("a") == wanted(tokens)
    assert bench.events[0] == EngineReady("e") and engine.ready
    engine.stop()
    assert not engine.ready
    count = len(bench.events)
    engine.submit(make_request("b", tokens))
    time.sleep(0.05)
    assert len(bench.events) == count


@pytest.mark.parametrize("where", ["launch", "fetch"])
def test_a_failure_of_the_device_is_told_and_ends_the_engine(running, where):
    bench = EngineBench()
    bench.runner.fail[where] = RuntimeError("the device is gone")
    engine = running(bench)
    until(lambda: engine.ready)
    engine.submit(make_request("a", prompt(5)))
    until(lambda: bench.posted(EngineFailed))
    until(lambda: not engine.ready)
    [failed] = bench.posted(EngineFailed)
    assert failed.engine == "e" and failed.why.startswith("RuntimeError: the device is gone\n")
    assert f"in {where}" in failed.why  # with its traceback
    engine.stop()
    assert not bench.of("a")


def test_stopping_an_engine_in_a_step_that_hangs_says_so(running):
    bench = EngineBench()
    bench.runner.hold = threading.Event()
    engine = running(bench)
    engine.submit(make_request("a", prompt(5)))
    until(lambda: bench.runner.launched == 2)
    with pytest.raises(TimeoutError, match=r"engine e is still in a step after 0.05 s"):
        engine.stop(0.05)
    bench.runner.hold.set()
    engine.stop()


@pytest.mark.parametrize("what", ["hangs", "fails"])
def test_nobody_waits_for_an_engine_that_is_stuck(running, what):
    """With a coordinator in front, the client hears of it within its deadline."""
    bench, mailbox, told = EngineBench(), Mailbox(), []
    engine = Engine("e", Role.IFB, bench.scheduler, bench.runner, FORM, post=mailbox.post)
    config = CoordinatorConfig(stall_timeout=0.2, queue_timeout=0.2, retries=0)
    coordinator = Coordinator([engine], mailbox, config=config)
    hold = threading.Event()
    if what == "hangs":
        bench.runner.hold = hold
    else:
        bench.runner.fail["fetch"] = RuntimeError("the device is gone")
    try:
        coordinator.start(told.extend)
        until(lambda: coordinator.ready)
        coordinator.submit(make_request("a", prompt(5)))
        until(lambda: told, 10.0)
        [event] = told
        assert event.finish is FinishReason.ERROR
        assert ("no token within 0.2 s" if what == "hangs" else "device is gone") in event.message
        until(lambda: coordinator.lifecycle.idle)
        if what == "hangs":
            hold.set()
            until(lambda: bench.scheduler.idle)  # the late step gives everything back
        else:
            assert not coordinator.ready
    finally:
        hold.set()
        coordinator.stop()


def test_a_process_that_serves_is_settled():
    before = gc.get_threshold(), sys.getswitchinterval()
    try:
        settle_process()
        assert gc.get_freeze_count() > 0 and gc.get_threshold()[0] > before[0][0]
        assert sys.getswitchinterval() < before[1]
    finally:
        gc.unfreeze()
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])


# ------------------------------------------------------------------ no token, no score


@pytest.mark.parametrize("best", [None, 0, 2])
def test_a_request_that_asks_for_nothing_ends_at_once(best):
    bench = EngineBench()
    options = SamplingOptions(prompt_logprobs=best)
    tokens = prompt(9) if best is None else prompt(1)  # nothing predicts a first token
    submit(bench, "a", tokens, 0, sampling=options)
    bench.drain()
    [event] = bench.of("a")
    assert (event.tokens, event.finish) == ([], FinishReason.LENGTH)
    assert event.prompt_logprobs == (None if best is None else [])
    assert bench.runner.launched == 0
    bench.check_drained()
