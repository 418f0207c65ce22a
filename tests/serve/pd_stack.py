"""Prefill and decode engines of the toy model, compiled once and put together in many ways."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dskjax.decode.rules import RuleOptions
from serve.attempts import CoordinatorConfig, Summary
from serve.build import Placement, build_engine
from serve.coordinator import Coordinator, Mailbox
from serve.engine import Engine
from serve.engine_api import Role
from serve.link import DeviceLink
from serve.request import FinishReason, Request
from serve.transfer.faults import Faults
from serve.transfer.local import LocalTransport
from tests.decode.plain import Ask, answer
from tests.serve.stack import Answers, assert_empty, make_request, small, toy_model, until

PAGE = 4
STRICT = {"rules": ("strict",), "accept": RuleOptions(name="strict")}
"""The only rule of the requests here: others would only take time to compile."""
NEVER = 10**6
"""Tokens from which a prompt would go layer by layer, where none should."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How many engines of which width."""

    prefill: int = 1
    decode: int = 1
    prefill_tp: int = 1
    decode_tp: int = 1
    ep: int = 1  # of every engine

    def __str__(self) -> str:
        widths = f"tp{self.prefill_tp}to{self.decode_tp}"
        return f"{self.prefill}P{self.decode}D-{widths}" + f"-ep{self.ep}" * (self.ep > 1)


_DEVICES = {
    (Role.PREFILL, 1): [(0,), (1,)],
    (Role.DECODE, 1): [(2,), (3,)],
    (Role.PREFILL, 2): [(4, 5)],
    (Role.DECODE, 2): [(6, 7)],
}


@functools.cache
def compiled(
    role: Role, index: int, width: int, modules: int, ep: int, layerwise: bool
) -> tuple[Engine, Placement]:
    """An engine that nobody starts: its runner and scheduler serve one cluster after another. Those
    that split experts score no prompts, to have fewer programs.
    """
    devices = tuple(jax.devices()[i] for i in _DEVICES[role, width][index])
    placement = Placement(f"{role.value}{index}", role, devices, ep)
    config = small(
        layerwise_from=1 if layerwise else NEVER,
        layer_group=1,
        pages=48,
        chunk=8 if role is Role.PREFILL else 4,
        prompt_logprobs=ep == 1,
        **STRICT,
    )
    engine = build_engine(
        toy_model(modules),
        config,
        placement,
        post=lambda event: None,
        transport=LocalTransport({}, threads=False),
    )
    return engine, placement


@dataclasses.dataclass
class Cluster:
    """A coordinator over running engines.

    Attributes:
        parts: what was delivered, by transfer id, in the order of delivery.
    """

    engines: list[Engine]
    coordinator: Coordinator
    transport: LocalTransport
    answers: Answers
    parts: dict[str, list]

    def serve(self, requests: Sequence[Request]) -> list[Summary]:
        """Submits all and waits for their ends; how each of them went."""
        for request in requests:
            self.coordinator.submit(request)
        self.answers.wait(request.id for request in requests)
        known = {summary.request_id: summary for summary in self.coordinator.history}
        return [known[request.id] for request in requests]

    def assert_empty(self) -> None:
        """Nothing of any request is left in coordinator, transport or engines."""
        until(lambda: self.coordinator.lifecycle.idle, 20.0)
        assert not self.transport._ledger._records
        for engine in self.engines:
            assert_empty(engine)


def cluster(
    layout: Layout, modules: int, *, layerwise: bool, faults: Faults | None = None, **limits
) -> contextlib.AbstractContextManager[Cluster]:
    """A layout's engines behind a coordinator; see `together`."""
    ep = layout.ep
    chosen = [
        compiled(role, index, ep * tp, modules, ep, layerwise or ep == 1)
        for role, engines, tp in (
            (Role.PREFILL, layout.prefill, layout.prefill_tp),
            (Role.DECODE, layout.decode, layout.decode_tp),
        )
        for index in range(engines)
    ]
    return together(chosen, layerwise=layerwise, faults=faults, **limits)


@contextlib.contextmanager
def together(
    chosen: Sequence[tuple[Engine, Placement]],
    *,
    layerwise: bool,
    faults: Faults | None = None,
    **limits,
) -> Iterator[Cluster]:
    """Fresh threads, coordinator and transport over compiled engines."""
    mailbox, answers, parts = Mailbox(), Answers(), {}

    transport = LocalTransport({p.name: p.mover() for _, p in chosen}, faults=faults)
    engines = []
    for engine, placement in chosen:
        runner, programs = engine._runner, engine._link._programs
        engines.append(
            _Recording(
                placement.name,
                placement.role,
                engine.scheduler,
                runner,
                engine.compat,
                post=mailbox.post,
                link=DeviceLink(runner, programs, transport, runner.cfg.num_hidden_layers),
            )
        )
        engines[-1].parts = parts
    config = CoordinatorConfig(
        layerwise_tokens=1 if layerwise else NEVER, local_prefill_tokens=0, **limits
    )
    coordinator = Coordinator(engines, mailbox, transport=transport, config=config)
    coordinator.start(answers.sink)
    try:
        until(lambda: coordinator.ready)
        yield Cluster(engines, coordinator, transport, answers, parts)
    finally:
        coordinator.stop()


class _Recording(Engine):
    """Keeps what is delivered to it."""

    parts: dict[str, list]

    def deliver(self, ticket, part):
        self.parts.setdefault(ticket.transfer_id, []).append((ticket, part))
        super().deliver(ticket, part)


@functools.cache
def asks(count: int = 16, seed: int = 0) -> tuple[Ask, ...]:
    """Prompts of one token to many pages; every other one is sampled."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 4, 5, 8, 9, *rng.integers(3, 34, count)][:count]
    return tuple(
        Ask(
            prompt=tuple(rng.integers(0, 5, int(length)).tolist()),
            max_tokens=12,
            temperature=float(n % 2),
            seed=n,
        )
        for n, length in enumerate(lengths)
    )


@functools.cache
def expected(ask: Ask, modules: int) -> list[int]:
    """What one engine, or none at all, says: one token at a time from the plain model."""
    return answer(ask, modules)


def requests_of(some: Sequence[Ask], name: str, **options) -> list[Request]:
    """One for each ask, with a prefix cache of their own and every kind of draft limit."""
    options.setdefault("salt", name)
    return [
        make_request(
            f"{name}-{n}",
            ask.prompt,
            ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            drafts=(None, 0, 1)[n % 3],
            ignore_eos=True,
            **options,
        )
        for n, ask in enumerate(some)
    ]


def check_texts(cluster: Cluster, some: Sequence[Ask], requests: Sequence[Request], modules: int):
    """Each is exactly right, or ends with an error after a right beginning; counts the right."""
    right = 0
    for ask, request in zip(some, requests, strict=True):
        end, said = cluster.answers.ends[request.id], cluster.answers.tokens[request.id]
        wanted = expected(ask, modules)
        if end.finish is FinishReason.ERROR:
            assert said == wanted[: len(said)], (request, said, wanted)
        else:
            assert end.finish is FinishReason.LENGTH and said == wanted, (request, said, wanted)
            right += 1
    return right
