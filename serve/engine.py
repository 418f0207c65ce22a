"""The loop of one engine: schedule, launch, and only then read what the step before did.

One thread owns scheduler, runner and device state. Everybody else leaves commands in its inbox and
hears of their effect through events; the thread never waits for anything but the device and, with
nothing to do, the inbox.
"""

import collections
import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from serve.engine_api import (
    EngineEvent,
    EngineFailed,
    EngineLoad,
    EngineReady,
    Held,
    Refused,
    Reserved,
    Role,
    Tokens,
)
from serve.errors import OverloadedError
from serve.expert_balancer import Balance
from serve.link import Link
from serve.plan import Runner, StepPlan, StepResult, TokenEvent
from serve.rank_scheduler import RankScheduler
from serve.request import FinishReason, Request, Status
from serve.scheduler import Scheduler
from serve.transfer.pools import Home
from serve.transfer.transport import KVForm, Part, Ticket

SWITCH_SECONDS = 0.0005
"""For how long another thread of this process may keep the interpreter from an engine's."""
LOAD_EVERY = 0.1
"""Seconds between snapshots of the load."""


def settle_process() -> None:
    """Settings of a whole process that serves, once everything is loaded and compiled.

    What is there by now stays, so collections need not walk through it; a step makes a thousand
    objects and no cycle, so they may be rarer; and no thread keeps the interpreter from an engine
    for long.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    sys.setswitchinterval(SWITCH_SECONDS)


@runtime_checkable
class EngineRunner(Runner, Protocol):
    """What an engine asks of its runner beside launching: see `serve.runner.Runner`."""

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that the compiled programs cannot serve."""
        ...


class Launched(NamedTuple):
    """A launched plan whose result is still to be read."""

    plan: StepPlan
    pending: Any
    at: float


class Observer:
    """What an engine reports about itself; does nothing. `serve.engine_metrics` counts."""

    def stepped(self, plan: StepPlan, result: StepResult, host: float, step: float) -> None:
        """A result was applied: host seconds between two launches, and seconds of the step."""

    def loaded(self, engine: "Engine") -> None:
        """A new snapshot of the load is there."""

    def balanced(self, balance: Balance) -> None:
        """Experts have moved."""


class Engine:
    """Implements `serve.engine_api.EngineHandle`.

    Args:
        name: unique.
        role: what it is for.
        scheduler: owned from now on.
        runner: owned from now on.
        compat: form of the cache.
        post: takes events; called from the engine's thread, must not block.
        link: sends and receives pages; None for an engine that does neither.
        observer: told about every step.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        scheduler: Scheduler | RankScheduler,
        runner: EngineRunner,
        compat: KVForm,
        *,
        post: Callable[[EngineEvent], None],
        link: Link | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.role, self.compat = name, role, compat
        self.scheduler, self._runner, self._link = scheduler, runner, link
        self._post, self._observer, self._clock = post, observer or Observer(), clock
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._stopping = self._over = False
        self._ready = False
        self._launched: collections.deque[Launched] = collections.deque()
        self._untold: list[TokenEvent] = []
        self._prefills = False  # whether requests came that are only prefilled here
        self._tpot = 0.0
        self._fetched = 0.0
        self._load_at = -1.0
        self._load = self._snapshot()
        self._thread = threading.Thread(target=self._main, name=f"engine-{name}", daemon=True)

    # ---- any thread

    @property
    def ready(self) -> bool:
        """Warmed up and alive."""
        return self._ready

    def start(self) -> None:
        """Starts the thread; the runner must be warmed up."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after the step that runs; nothing more is posted.

        Raises:
            TimeoutError: the thread is still in a step after `timeout` seconds.
        """
        self._stopping = True
        self._do(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"engine {self.name} is still in a step after {timeout} s")

    def load(self) -> EngineLoad:
        """The latest snapshot."""
        return self._load

    def validate(self, request: Request) -> None:
        """Whether the engine, empty, could serve the request.

        Raises:
            ValueError: it could not.
        """
        self.scheduler.check(request)
        self._runner.check(request)

    def submit(self, request: Request) -> None:
        """See `serve.engine_api.EngineHandle`."""
        self._do(lambda: self._add(request))

    def submit_prefill(self, request: Request, ticket: Ticket) -> None:
        """See `serve.engine_api.EngineHandle`."""

        def add() -> None:
            assert self._link is not None
            self._prefills = True
            self._link.begin(ticket, request, lambda: self._home(request))
            self._add(request)

        self._do(add)

    def reserve(self, request: Request) -> None:
        """See `serve.engine_api.EngineHandle`."""
        self._do(lambda: self._reserve(request))

    def deliver(self, ticket: Ticket, part: Part) -> None:
        """See `serve.engine_api.EngineHandle`."""
        self._do(lambda: self._receive(ticket, part))

    def activate(self, request_id: str, tokens: list[int]) -> None:
        """See `serve.engine_api.EngineHandle`."""

        def start() -> None:
            request = self.scheduler.find(request_id)
            if request is not None and request.status is Status.RECEIVING:
                self.scheduler.start_received(request_id, tokens)

        self._do(start)

    def release(self, request_id: str, failed: bool) -> None:
        """See `serve.engine_api.EngineHandle`."""

        def release() -> None:
            self._drop(request_id)
            request = self.scheduler.find(request_id)
            if request is None:
                return
            if request.status in (Status.HELD, Status.RECEIVING):
                self.scheduler.release(request_id, failed=failed)
            else:  # what a prefill engine has, it has computed itself
                self.scheduler.abort(request_id, spoiled=failed and not request.prefill_only)

        self._do(release)

    def abort(self, request_id: str) -> None:
        """See `serve.engine_api.EngineHandle`."""
        self._do(lambda: self.scheduler.abort(request_id))

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """See `serve.engine_api.EngineHandle`."""
        self._do(lambda: self.scheduler.finish(request_id, reason))

    def _do(self, command: Callable[[], Any]) -> None:
        with self._wake:
            if not self._over:  # else nobody will ever look
                self._inbox.append(command)
                self._wake.notify()

    # ---- the engine's thread

    def _main(self) -> None:
        self._ready = True
        self._post(EngineReady(self.name))
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:  # whatever it was, nobody may wait for this engine any more
            self._close()
            trace = "".join(traceback.format_exception(error))
            self._post(EngineFailed(self.name, f"{type(error).__name__}: {error}\n{trace}"))
        self._close()

    def _close(self) -> None:
        with self._wake:
            self._ready, self._over = False, True
            self._inbox.clear()

    def _turn(self) -> None:
        """One iteration: commands, a launch, and the result of the launch before."""
        self._obey()
        begun = self._clock()
        plan = self.scheduler.schedule(begun)
        if plan is not None:
            pending = self._runner.launch(plan, self.scheduler.page_table)
            launched = self._clock()
            self._launched.append(Launched(plan, pending, launched))
            if self._link is not None:
                for request in plan.requests:
                    if request.prefill_only:
                        self._link.complete(request.id)
        self._tell()
        host = self._clock() - begun
        if len(self._launched) > (plan is not None):
            self._apply(host)
        elif plan is None:
            self._idle()
        if self._link is not None:
            for event in self._link.installed(self.name):
                self._post(event)
        if self._clock() - self._load_at >= LOAD_EVERY:
            self._report()

    def _obey(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _report(self) -> None:
        self._load_at, self._load = self._clock(), self._snapshot()
        self._observer.loaded(self)

    def _idle(self) -> None:
        """Waits for a command; looks after checksums that the device still computes."""
        if self._load_at < self._fetched:  # whoever asks now wants to know of the last step
            self._report()
        busy = self._link is not None and self._link.checking
        self._rest(0.0005 if busy else 0.1)

    def _rest(self, seconds: float) -> None:
        with self._wake:
            if not self._inbox and not self._stopping:
                self._wake.wait(seconds)

    def _apply(self, host: float) -> None:
        plan, pending, launched = self._launched.popleft()
        result = self._runner.fetch(pending)
        fetched = self._clock()
        self._untold = self.scheduler.apply(plan, result, fetched)
        # Steps overlap: this one had the device to itself from the result of the one before.
        self.scheduler.observe(plan, result, fetched - max(launched, self._fetched))
        self._fetched = fetched
        if len(result.count) and (emitted := int(result.count.sum())):
            tpot = (fetched - launched) * len(result.count) / emitted
            self._tpot += 0.1 * (tpot - self._tpot) if self._tpot else tpot
        host += self._clock() - fetched
        self._observer.stepped(plan, result, host, fetched - launched)

    def _tell(self) -> None:
        """Posts what the last result brought. After the next launch: whoever makes text of it then
        works while the device does, and does not keep the interpreter from the launch.
        """
        events, self._untold = self._untold, []
        if self._prefills:
            for event in events:
                if event.request.prefill_only:
                    self._post(
                        Held(
                            self.name,
                            event.request.id,
                            event.tokens,
                            event.logprobs,
                            event.finish,
                            event.stop_token,
                            event.prompt_logprobs,
                        )
                    )
            events = [event for event in events if not event.request.prefill_only]
        if events:
            self._post(Tokens(self.name, events))

    def _add(self, request: Request) -> None:
        if request.empty:
            scores = [] if request.scored else None
            end = TokenEvent(request, [], FinishReason.LENGTH, prompt_logprobs=scores)
            self._untold.append(end)
            return
        try:
            self.scheduler.add(request, self._clock())
        except (ValueError, OverloadedError) as error:
            self._drop(request.id)
            event = TokenEvent(request, [], FinishReason.ERROR, message=str(error))
            self._post(Tokens(self.name, [event]))

    def _reserve(self, request: Request) -> None:
        try:
            hit = self.scheduler.reserve(request, self._clock())
        except ValueError as error:
            self._post(Refused(self.name, request.id, str(error), permanent=True))
            return
        if hit is None:
            self._post(Refused(self.name, request.id, "no slot or no pages"))
        else:
            rank = self._home(request).rank
            self._post(Reserved(self.name, request.id, hit, rank))

    def _drop(self, request_id: str) -> None:
        if self._link is not None:
            self._link.drop(request_id)

    def _receive(self, ticket: Ticket, part: Part) -> None:
        assert self._link is not None
        request = self.scheduler.find(ticket.transfer_id)
        home = None
        if request is not None and request.status is Status.RECEIVING:
            home = self._home(request)
            assert home.rank == ticket.target_rank, (ticket, home)
        self._link.receive(ticket, part, home)

    def _home(self, request: Request) -> Home:
        rank = self.scheduler.rank_of(request.id)
        assert rank is not None, request
        return Home(rank, request.slot, self.scheduler.pages(request.id))

    def _snapshot(self) -> EngineLoad:
        stats, config = self.scheduler.stats(), self.scheduler.config
        generated = tuple(r.emitted for r in self.scheduler.requests if r.status is Status.RUNNING)
        return EngineLoad(
            running=stats.running + stats.prefilling + stats.receiving + stats.held,
            waiting=stats.waiting,
            waiting_tokens=stats.waiting_tokens,
            free_pages=stats.free_pages,
            total_pages=stats.total_pages,
            page_size=config.page_size,
            slots=config.num_slots,
            mean_output=stats.mean_output,
            generated=generated,
            tpot=self._tpot,
        )
