"""Engines without devices for `serve.simulate`, and the clock that they share."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable

import numpy as np

from serve.blocks import BlockManager
from serve.engine_api import (
    EngineEvent,
    EngineLoad,
    Held,
    Installed,
    Refused,
    Reserved,
    Role,
    Tokens,
)
from serve.plan import StepPlan, StepResult, TokenEvent
from serve.request import FinishReason, Request, Status
from serve.scheduler import Scheduler
from serve.scheduler_config import PrefillPolicy, SchedulerConfig
from serve.transfer.local import LocalTransport
from serve.transfer.transport import KVForm, Part, Ticket

PAGE = 64
FORM = KVForm(
    model="simulated",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    page_size=PAGE,
    layers=62,
    latent=512,
    rope=64,
    mtp_scheme="none",
    mtp_depth=0,
    page_bytes=62 * PAGE * 576 * 2,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds of a step. The defaults are round numbers of no particular machine.

    Attributes:
        prefill_base, prefill_token: of a step with prompt rows, and of each row.
        prefill_pair: of each pair of a row and a row that it attends to.
        decode_base, decode_request: of a decode step, and of each request in it.
        decode_row: of each cached row that it reads.
    """

    prefill_base: float = 0.01
    prefill_token: float = 4e-5
    prefill_pair: float = 1e-9
    decode_base: float = 0.015
    decode_request: float = 2e-4
    decode_row: float = 5e-8


class Clock:
    """Time that goes from event to event."""

    def __init__(self):
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __call__(self) -> float:
        """Seconds since the start."""
        return self.now

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Does something later; at the same time, in the order of the calls."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._order), what))

    def run(self, until: Callable[[], bool]) -> None:
        """Goes on until the condition holds or nothing is left to do."""
        while self._heap and not until():
            self.now, _, what = heapq.heappop(self._heap)
            what()


class SimEngine:
    """What both simulated engines share; implements `serve.engine_api.EngineHandle`."""

    role: Role

    def __init__(self, name: str, clock: Clock, costs: Costs, post: Callable[[EngineEvent], None]):
        self.name, self.compat = name, FORM
        self.clock, self.costs, self.post = clock, costs, post
        self.busy = False

    @property
    def ready(self) -> bool:
        """Always."""
        return True

    def start(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        """Nothing to do."""

    def validate(self, request: Request) -> None:
        """Takes anything."""

    def kick(self) -> None:
        """Begins a step if none runs and there is something to do."""
        if not self.busy and (seconds := self.begin()) is not None:
            self.busy = True
            self.clock.after(seconds, self._end)

    def begin(self) -> float | None:
        """Begins a step and returns its seconds, or None."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends the step."""
        raise NotImplementedError

    def _end(self) -> None:
        self.busy = False
        self.end()
        self.kick()

    def load(self) -> EngineLoad:
        """See `EngineHandle`."""
        raise NotImplementedError

    def submit(self, request: Request) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def submit_prefill(self, request: Request, ticket: Ticket) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def reserve(self, request: Request) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def deliver(self, ticket: Ticket, part: Part) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def activate(self, request_id: str, tokens: list[int]) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def release(self, request_id: str, failed: bool) -> None:
        """See `EngineHandle`."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """See `EngineHandle`."""
        self.release(request_id, False)

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """See `EngineHandle`."""
        self.release(request_id, False)


class SimPrefill(SimEngine):
    """The real scheduler, whose steps take the time of their prompt rows."""

    role = Role.PREFILL

    def __init__(self, *args, transport: LocalTransport, policy: PrefillPolicy, tokens: int):
        super().__init__(*args)
        config = SchedulerConfig(
            num_slots=128,
            num_pages=16384,
            page_size=PAGE,
            max_columns=1024,
            max_prefill_tokens=tokens,
            prefill_policy=policy,
        )
        self._transport = transport
        self._scheduler = Scheduler(config, BlockManager(16384, PAGE))
        self._tickets: dict[str, Ticket] = {}
        self._plan: StepPlan | None = None

    def load(self) -> EngineLoad:
        """See `EngineHandle`."""
        stats, config = self._scheduler.stats(), self._scheduler.config
        return EngineLoad(
            running=stats.prefilling + stats.held,
            waiting=stats.waiting,
            waiting_tokens=stats.waiting_tokens,
            free_pages=stats.free_pages,
            total_pages=stats.total_pages,
            page_size=PAGE,
            slots=config.num_slots,
        )

    def submit_prefill(self, request: Request, ticket: Ticket) -> None:
        """See `EngineHandle`."""
        self._tickets[request.id] = ticket
        self._scheduler.add(request, self.clock.now, force=True)
        self.clock.after(0.0, self.kick)

    def release(self, request_id: str, failed: bool) -> None:
        """See `EngineHandle`."""
        self._tickets.pop(request_id, None)
        self._scheduler.abort(request_id)
        self.clock.after(0.0, self.kick)

    def begin(self) -> float | None:
        """See `SimEngine`."""
        self._plan = self._scheduler.schedule(self.clock.now)
        if self._plan is None:
            return None
        rows = sum(chunk.length for chunk in self._plan.chunks)
        pairs = sum(c.length * (c.start + c.length / 2) for c in self._plan.chunks)
        costs = self.costs
        return costs.prefill_base + costs.prefill_token * rows + costs.prefill_pair * pairs

    def end(self) -> None:
        """See `SimEngine`."""
        assert self._plan is not None
        count = len(self._plan.requests)
        ones = np.ones(count, np.int32)
        finished = np.array([request.remaining == 1 for request in self._plan.requests], bool)
        result = StepResult(np.ones((count, 1), np.int32), ones, 0 * ones, 0 * ones, finished)
        for event in self._scheduler.apply(self._plan, result, self.clock.now):
            id = event.request.id
            ticket = self._tickets.pop(id, None)
            if ticket is not None and event.request.status is Status.HELD:
                part = Part(
                    index=0,
                    is_last=True,
                    layers=(0, ticket.layers),
                    pages=ticket.pages,
                    arrays=None,
                    checksum=0,
                    nbytes=ticket.nbytes,
                )
                self._transport.push(ticket, part)
            self.post(Held(self.name, id, event.tokens, None, event.finish))


class SimDecode(SimEngine):
    """Requests that all advance by `stride` tokens at once."""

    role = Role.DECODE

    def __init__(self, *args, slots: int, pages: int, stride: int):
        super().__init__(*args)
        self._slots, self._pages, self._stride = slots, pages, stride
        self._reserved: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._joined: list[Request] = []
        self._free = pages
        self._tpot = 0.0

    def load(self) -> EngineLoad:
        """See `EngineHandle`."""
        return EngineLoad(
            running=len(self._reserved),
            free_pages=self._free,
            total_pages=self._pages,
            page_size=PAGE,
            slots=self._slots,
            tpot=self._tpot,
        )

    @staticmethod
    def _need(request: Request) -> int:
        return -(-(request.prompt_len + request.stop.max_tokens) // PAGE)

    def reserve(self, request: Request) -> None:
        """See `EngineHandle`."""
        need = self._need(request)
        if len(self._reserved) >= self._slots or need > self._free:
            self.post(Refused(self.name, request.id, "full"))
            return
        self._free -= need
        self._reserved[request.id] = request
        self.post(Reserved(self.name, request.id, 0))

    def deliver(self, ticket: Ticket, part: Part) -> None:
        """See `EngineHandle`."""
        self.post(Installed(self.name, ticket.transfer_id, part.index, True))

    def activate(self, request_id: str, tokens: list[int]) -> None:
        """See `EngineHandle`."""
        request = self._reserved[request_id]
        request.tokens.extend(tokens)
        self._running[request_id] = request
        self.clock.after(0.0, self.kick)

    def release(self, request_id: str, failed: bool) -> None:
        """See `EngineHandle`."""
        self._running.pop(request_id, None)
        if request := self._reserved.pop(request_id, None):
            self._free += self._need(request)

    def begin(self) -> float | None:
        """See `SimEngine`."""
        self._joined = list(self._running.values())
        if not self._joined:
            return None
        rows = sum(len(request.tokens) for request in self._joined)
        costs = self.costs
        step = costs.decode_base + costs.decode_request * len(self._joined)
        self._tpot = step + costs.decode_row * rows
        return self._tpot * self._stride

    def end(self) -> None:
        """See `SimEngine`."""
        events = []
        for request in self._joined:
            if request.id not in self._running:
                continue
            new = [1] * min(self._stride, request.remaining)
            request.tokens.extend(new)
            finish = None if request.remaining else FinishReason.LENGTH
            events.append(TokenEvent(request, new, finish))
            if finish:
                self.release(request.id, False)
        if events:
            self.post(Tokens(self.name, events))
