"""A server without devices: the real coordinator, router, transport and prefill scheduler under a
discrete-event clock, with engines whose steps take the time that a cost model says.

What is simulated and not real: the time of a step, and decoding, which advances all requests of an
engine by a few tokens at once and reserves the pages of a whole answer. Tokens are counted, not
computed, and no bytes move.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serve.attempts import CoordinatorConfig
from serve.engine_api import EngineEvent
from serve.lifecycle import Lifecycle
from serve.plan import TokenEvent
from serve.request import FinishReason, Request, SamplingOptions, StopOptions
from serve.router import Router
from serve.scheduler_config import PrefillPolicy
from serve.sim_engines import Clock, Costs, SimDecode, SimEngine, SimPrefill
from serve.transfer.local import LocalTransport


class Arrival(NamedTuple):
    """A request of the load: seconds, tokens in, tokens out."""

    at: float
    prompt: int
    output: int


def make_load(
    count: int,
    rate: float,
    seed: int,
    *,
    prompt: tuple[float, int] = (3500.0, 16384),
    output: tuple[float, int] = (1200.0, 32768),
    spread: float = 1.0,
) -> list[Arrival]:
    """Poisson arrivals with log-normal lengths.

    Args:
        count: requests.
        rate: requests a second.
        seed: of the draws.
        prompt, output: mean before the cut, and longest, in tokens.
        spread: standard deviation of the lengths' logarithms.
    """
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, count))

    def lengths(mean: float, longest: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        return np.clip(drawn, 4, longest).astype(int)

    columns = at.tolist(), lengths(*prompt).tolist(), lengths(*output).tolist()
    return [Arrival(*row) for row in zip(*columns, strict=True)]


class Served(NamedTuple):
    """How a request went: seconds to the first token, and a token after it."""

    arrival: Arrival
    ttft: float
    tpot: float


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """How a load went, and how many seconds it took to arrive."""

    served: list[Served]
    seconds: float

    def goodput(self, ttft: float = 2.0, tpot: float = 0.05) -> float:
        """Requests a minute of arrivals that kept both limits, which are in seconds."""
        good = sum(s.ttft < ttft and s.tpot < tpot for s in self.served)
        return good * 60 / self.seconds

    def percentile(self, name: str, q: int, least_prompt: int = 0) -> float:
        """A percentile of "ttft" or "tpot", of prompts with at least so many tokens."""
        values = [getattr(s, name) for s in self.served if s.arrival.prompt >= least_prompt]
        return float(np.percentile(values, q))


def simulate(
    load: Sequence[Arrival],
    router: Router,
    *,
    prefill: int = 2,
    decode: Sequence[tuple[int, int]] = ((96, 9000),) * 4,
    stride: int = 16,
    chunk: int = 8192,
    policy: PrefillPolicy = "short-first",
    costs: Costs | None = None,
    tick: float = 0.1,
) -> Report:
    """Serves a load to its end.

    Args:
        load: the requests.
        router: chooses the decoding engine.
        prefill: engines.
        decode: slots and pages of each engine.
        stride: tokens by which decoding advances at once.
        chunk: prompt rows of a step.
        policy: of the prefill schedulers.
        costs: of the steps.
        tick: seconds between two looks of the coordinator at its deadlines.
    """
    clock, costs = Clock(), costs or Costs()
    prefills = [f"p{i}" for i in range(prefill)]
    decodes = [f"d{i}" for i in range(len(decode))]
    places = {name: lambda packet, ranks: packet for name in prefills + decodes}
    transport = LocalTransport(places, clock=clock, threads=False)
    requests = [_request(i, arrival) for i, arrival in enumerate(load)]
    first: dict[str, float] = {}
    last: dict[str, float] = {}

    def sink(events: list[TokenEvent]) -> None:
        for event in events:
            first.setdefault(event.request.id, clock.now)
            if event.finish is not None:
                assert event.finish is FinishReason.LENGTH, event.message
                last[event.request.id] = clock.now

    def hear(event: EngineEvent) -> None:
        lifecycle.handle(event, clock.now)
        while transport.step():
            pass

    def post(event: EngineEvent) -> None:
        clock.after(0.0, lambda: hear(event))

    def look() -> None:
        lifecycle.tick(clock.now)
        clock.after(tick, look)

    engines: list[SimEngine] = [
        SimPrefill(name, clock, costs, post, transport=transport, policy=policy, tokens=chunk)
        for name in prefills
    ]
    engines += [
        SimDecode(name, clock, costs, post, slots=slots, pages=pages, stride=stride)
        for name, (slots, pages) in zip(decodes, decode, strict=True)
    ]
    config = CoordinatorConfig(local_prefill_tokens=0, queue_timeout=1e9, prefill_timeout=1e9)
    lifecycle = Lifecycle(engines, transport, router, config, sink)
    for request in requests:
        clock.after(request.arrival, lambda r=request: lifecycle.submit(r, clock.now))
    clock.after(tick, look)
    clock.run(lambda: len(last) == len(load))
    served = [_served(r, a, first, last) for r, a in zip(requests, load, strict=True)]
    return Report(served, load[-1].at)


def _request(number: int, arrival: Arrival) -> Request:
    tokens = range(number * 100_000, number * 100_000 + arrival.prompt)  # no two share a prefix
    stop = StopOptions(max_tokens=arrival.output)
    sampling = SamplingOptions(temperature=0.0)
    return Request(f"r{number}", tokens, stop=stop, sampling=sampling, arrival=arrival.at)


def _served(
    request: Request, arrival: Arrival, first: dict[str, float], last: dict[str, float]
) -> Served:
    begin, end = first[request.id], last[request.id]
    return Served(arrival, begin - arrival.at, (end - begin) / max(1, arrival.output - 1))
