"""An engine keeps the contract of `serve.engine_api.EngineHandle`, alive or not."""

import inspect

import pytest

from serve.engine import Engine
from serve.engine_api import EngineFailed, EngineHandle, EngineReady, Held, Reserved, Role, Tokens
from serve.request import FinishReason
from tests.serve.engine_bench import EngineBench, part, ticket
from tests.serve.fake import continuation
from tests.serve.harness import EOS, long_answer, make_request, prompt


def prefill(id, tokens, max_tokens=8):
    request = make_request(id, tokens, max_tokens)
    request.prefill_only = True
    return request


def test_every_call_of_the_handle_is_there_with_its_arguments():
    bench = EngineBench()
    assert isinstance(bench.engine, EngineHandle)
    calls = [name for name, _ in inspect.getmembers(EngineHandle, inspect.isfunction)]
    asked = {name for name in calls if not name.startswith("_")}
    assert {"submit", "submit_prefill", "reserve", "deliver", "activate", "release"} < asked
    for name in asked:
        wanted = inspect.signature(getattr(EngineHandle, name)).parameters
        own = inspect.signature(getattr(Engine, name)).parameters
        assert list(own)[: len(wanted)] == list(wanted), name
        assert all(p.default is not p.empty for p in list(own.values())[len(wanted) :]), name
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public == asked | {"ready"}


def test_a_dead_engine_ignores_every_call():
    bench = EngineBench(Role.DECODE)
    engine = bench.engine
    bench.runner.fail["fetch"] = RuntimeError("the device is gone")
    engine.submit(make_request("a", prompt(5)))
    engine._main()  # returns when the engine is dead
    assert [type(event) for event in bench.events] == [EngineReady, EngineFailed]
    assert not engine.ready
    engine.submit(make_request("b", prompt(5)))
    engine.submit_prefill(prefill("c#0", prompt(5)), ticket("c", 5))
    engine.reserve(make_request("d#0", prompt(5)))
    engine.deliver(ticket("d", 5), part(prompt(6), (0, 2)))
    engine.activate("d#0", [1])
    engine.release("d#0", True)
    engine.abort("b")
    engine.finish("b", FinishReason.STOP)
    assert not engine._inbox, "what nobody will ever do is kept"
    engine.stop()
    assert len(bench.events) == 2
    assert engine.load().slots == 4  # the latest snapshot


def test_an_engine_that_never_started_can_be_stopped():
    bench = EngineBench()
    Engine.stop(bench.engine)
    assert not bench.engine.ready and not bench.events


@pytest.mark.parametrize("why", ["the queue is full", "it can never run"])
def test_a_prefill_that_is_refused_is_told_with_the_reason(why):
    bench = EngineBench(Role.PREFILL, max_waiting=1, num_slots=1)
    bench.engine.submit_prefill(prefill("a#0", prompt(5)), ticket("a", 5))
    long = why == "it can never run"
    tokens = prompt(60) if long else prompt(6)
    bench.engine.submit_prefill(prefill("b#0", tokens, 60 if long else 8), ticket("b", len(tokens)))
    bench.turn()
    [told] = bench.posted(Tokens)
    [event] = told.events
    assert event.request.id == "b#0" and event.finish is FinishReason.ERROR
    assert ("60 prompt tokens" if long else "requests wait already") in event.message
    assert ("drop", "b#0") in bench.link.calls, "a part of it could still be pushed"
    bench.drain()
    assert [held.request_id for held in bench.posted(Held)] == ["a#0"]
    bench.engine.release("a#0", False)
    bench.drain()
    bench.check_drained()


@pytest.mark.parametrize("failed", [True, False])
def test_what_a_failed_transfer_brought_is_found_by_nobody_even_once_it_decodes(failed):
    bench = EngineBench(Role.DECODE)
    tokens = long_answer(21, 8)
    first = continuation(tokens, make_request("x", tokens).stop, EOS)[0][:1]
    bench.engine.reserve(make_request("a#0", tokens))
    bench.engine.deliver(ticket("a", 21), part([*tokens, *first], (0, 6)))
    bench.engine.activate("a#0", first)
    bench.turn(3)
    bench.engine.release("a#0", failed)
    bench.drain()
    bench.engine.reserve(make_request("b#0", tokens))
    bench.turn()
    assert (bench.posted(Reserved)[-1].hit_tokens == 0) == failed
    bench.engine.release("b#0", True)
    bench.drain()
    bench.check_drained()
