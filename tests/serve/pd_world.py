"""Engines, transport, coordinator and clients under one clock, driven step by step."""

from collections.abc import Callable

from serve.attempts import CoordinatorConfig
from serve.engine_api import (
    Role,
)
from serve.lifecycle import Lifecycle
from serve.plan import TokenEvent
from serve.request import FinishReason, Request, SamplingOptions, StopOptions
from serve.router import Router
from serve.transfer.faults import Faults
from serve.transfer.local import LocalTransport
from serve.transfer.transport import Quarantine
from tests.serve.pd_fakes import FakeEngine, answer, place


def prompt(length, seed=1):
    return [1 + (i * 37 + seed * 101) % 900 for i in range(length)]


CONFIG = CoordinatorConfig(
    layerwise_tokens=12,
    reserve_timeout=2.0,
    prefill_timeout=4.0,
    transfer_timeout=3.0,
    stall_timeout=4.0,
    queue_timeout=100.0,
    refuse_backoff=0.02,
    local_prefill_tokens=0,
)


class World:
    """Engines, transport, coordinator and clients under one clock."""

    def __init__(
        self,
        prefill=1,
        decode=1,
        *,
        faults=None,
        config=CONFIG,
        lifecycle: Callable[..., Lifecycle] = Lifecycle,
        **sizes,
    ):
        self.now = 0.0
        self.faults = faults or Faults(seconds=1.0)
        self.engines = [FakeEngine(f"p{i}", Role.PREFILL, **sizes) for i in range(prefill)]
        self.engines += [FakeEngine(f"d{i}", Role.DECODE, **sizes) for i in range(decode)]
        if not prefill:
            self.engines = [FakeEngine(f"e{i}", Role.IFB, **sizes) for i in range(decode)]
        self.by_name = {engine.name: engine for engine in self.engines}
        self.transport = LocalTransport(
            {engine.name: place for engine in self.engines},
            clock=lambda: self.now,
            faults=self.faults,
            threads=False,
            quarantine=Quarantine(1 << 20, 1e9),
        )
        for engine in self.engines:
            engine.transport = self.transport
        self.life = lifecycle(
            self.engines, self.transport if prefill else None, Router(), config, self.sink
        )
        self.requests: dict[str, Request] = {}
        self.got: dict[str, list] = {}
        self.expected: dict[str, list] = {}
        self.moves = 100  # of the transport in a round
        self.ends: dict[str, TokenEvent] = {}
        self.gone: set[str] = set()

    def sink(self, events):
        for event in events:
            id = event.request.id
            assert event.request is self.requests[id]
            assert id not in self.ends, f"{id} got an event after its end"
            self.got[id].extend(event.tokens)
            if event.finish is not None:
                self.ends[id] = event
            self.check(id)

    def check(self, id):
        """Never a wrong token."""
        got, expected = self.got[id], self.expected[id]
        assert got == expected[: len(got)], f"{id}: {got} is not the beginning of {expected}"
        end = self.ends.get(id)
        if end is not None and end.finish is not FinishReason.ERROR:
            assert got == expected, f"{id} ended after {len(got)} of {len(expected)} tokens"

    def submit(self, prompt, max_tokens=4, priority=0):
        id = f"r{len(self.requests)}"
        stop = StopOptions(max_tokens=max_tokens)
        greedy = SamplingOptions(temperature=0.0)
        request = Request(id, prompt, stop=stop, sampling=greedy, priority=priority)
        self.requests[id], self.got[id] = request, []
        self.expected[id] = answer(prompt, stop)
        self.life.submit(request, self.now)
        return id

    def end(self, id, reason=FinishReason.ABORT):
        self.gone.add(id)
        self.life.end(id, reason, self.now)

    def event(self, engine):
        if engine.events:
            self.life.handle(engine.events.popleft(), self.now)

    def round(self):
        """Everybody gets a turn; time goes on, faster if there was nothing to do."""
        busy = any(
            e.inbox or e.waiting or any(r.decoding and not r.held for r in e.runs.values())
            for e in self.engines
        )
        for engine in self.engines:
            engine.work()
        for _ in range(self.moves):
            if not self.transport.step():
                break
            busy = True
        for engine in self.engines:
            while engine.events:
                busy = True
                self.event(engine)
        self.now += 0.01 if busy else 0.2
        self.life.tick(self.now)

    def until(self, condition, rounds=2000):
        for _ in range(rounds):
            if condition():
                return
            self.round()
        raise AssertionError(f"not reached in {rounds} rounds: {self.life.books.records}")

    def drain(self):
        """Lets everything end, and checks that everything was given back."""
        self.until(lambda: self.life.idle and all(e.idle for e in self.engines))
        while self.transport.step():
            pass
        for id in self.requests:
            assert id in self.ends or id in self.gone, f"{id} never ended"
        for engine in self.engines:
            assert engine.pages_held == 0, f"{engine.name} lost {engine.pages_held} pages"
        assert not self.transport._ledger._records
        assert self.transport._quarantine.nbytes == 0

    def served(self, *ids):
        """Whether these came to their own end."""
        return all(self.ends[id].finish in (FinishReason.LENGTH, FinishReason.STOP) for id in ids)

    def summary(self, id):
        return next(s for s in self.life.books.history if s.request_id == id)
