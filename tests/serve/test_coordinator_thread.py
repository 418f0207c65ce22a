"""The coordinator's thread, its queue and what it refuses."""

import time

import pytest

from serve.attempts import CoordinatorConfig
from serve.coordinator import Coordinator, Mailbox
from serve.engine_api import Role
from serve.errors import OverloadedError, UnavailableError
from serve.request import FinishReason, Request, StopOptions
from serve.transfer.local import LocalTransport
from tests.serve.pd_fakes import FakeEngine, answer, place
from tests.serve.pd_world import prompt


class Threaded(FakeEngine):
    """A fake engine that works when its events are asked for; posts into a mailbox."""

    def attach(self, mailbox):
        self.mailbox = mailbox

    def pump(self):
        self.work()
        while self.events:
            self.mailbox.post(self.events.popleft())


@pytest.fixture
def server():
    mailbox = Mailbox()
    engines = [Threaded("p0", Role.PREFILL), Threaded("d0", Role.DECODE)]
    transport = LocalTransport({engine.name: place for engine in engines})
    for engine in engines:
        engine.transport = transport
        engine.attach(mailbox)
    coordinator = Coordinator(
        engines, mailbox, transport=transport, config=CoordinatorConfig(max_queue=3)
    )
    yield coordinator, engines
    coordinator.stop()


def pump(engines, condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing came in time"
        for engine in engines:
            engine.pump()
        time.sleep(0.0005)


def test_thread_serves_requests(server):
    coordinator, engines = server
    got, ends = {}, {}

    def sink(events):
        for event in events:
            got.setdefault(event.request.id, []).extend(event.tokens)
            if event.finish:
                ends[event.request.id] = event.finish

    assert not coordinator.ready
    coordinator.start(sink)
    assert coordinator.ready and coordinator.engines() == ["p0", "d0"]
    stop = StopOptions(max_tokens=5)
    for i in range(4):
        coordinator.submit(Request(f"a{i}", prompt(4 + 9 * (i % 2), i), stop=stop))
    coordinator.submit_to("p0", Request("probe", prompt(3), stop=StopOptions(max_tokens=1)))
    with pytest.raises(ValueError, match="in use"):
        coordinator.submit(Request("a0", prompt(4), stop=stop))
    with pytest.raises(ValueError, match="too long"):
        coordinator.submit(Request("long", prompt(400), stop=stop))
    pump(engines, lambda: len(ends) == 5)
    for i in range(4):
        assert got[f"a{i}"] == answer(prompt(4 + 9 * (i % 2), i), stop)
    assert all(s.tokens_transferred for s in coordinator.history if s.request_id != "probe")
    assert got["probe"] == answer(prompt(3), StopOptions(max_tokens=1))


def test_thread_refuses_what_it_cannot_queue(server):
    coordinator, engines = server
    stop = StopOptions(max_tokens=5)
    with pytest.raises(UnavailableError):
        coordinator.submit(Request("early", prompt(4), stop=stop))
    with pytest.raises(UnavailableError):
        coordinator.submit_to("p0", Request("early", prompt(4), stop=stop))
    ends = []
    coordinator.start(lambda events: ends.extend(e.request.id for e in events if e.finish))
    for i in range(7):  # four slots and three places
        coordinator.submit(Request(f"a{i}", prompt(4, i), stop=stop))
    with pytest.raises(OverloadedError):
        coordinator.submit(Request("more", prompt(4), stop=stop))
    coordinator.abort("a6")
    pump(engines, lambda: len(ends) == 6)
    assert "a6" not in ends
    pump(engines, lambda: coordinator.lifecycle.idle and all(e.idle for e in engines))
    assert all(engine.pages_held == 0 for engine in engines)
    engines[0].kill()
    pump(engines[:1], lambda: not coordinator.ready)
    with pytest.raises(UnavailableError):
        coordinator.submit(Request("late", prompt(4), stop=stop))


def test_failed_thread_tells_every_client(server):
    coordinator, engines = server
    ends = {}
    coordinator.start(lambda events: ends.update({e.request.id: e for e in events if e.finish}))
    coordinator.submit(Request("a", prompt(4), stop=StopOptions(max_tokens=5)))
    engines[0].submit_prefill = None  # a bug
    pump(engines, lambda: "a" in ends)
    assert ends["a"].finish is FinishReason.ERROR and "coordinator failed" in ends["a"].message
    assert not coordinator.ready
