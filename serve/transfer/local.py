"""The transport between engines of one process: arrays go from device to device.

Two kinds of threads, so that a source which still computes holds up nobody else's parts:
- one a source waits until a part's arrays are computed, in the order they were pushed;
- one a target moves what is ready. Small parts that wait at the same time go as one packet; a few
  packets at most are under way at once, the others wait here.

A part is handed to the target when its arrays are there, so the target's device never waits for it.
"""

import dataclasses
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from serve.transfer.device import corrupt_arrays
from serve.transfer.faults import Faults
from serve.transfer.ledger import Ledger, Stats
from serve.transfer.states import CancelResult
from serve.transfer.transport import (
    Deliver,
    Endpoint,
    KVTransport,
    Part,
    Progress,
    Quarantine,
    Ticket,
    Timeline,
)

log = logging.getLogger(__name__)

Place = Callable[[list[Any], list[int]], list[Any]]
"""Moves pytrees to an engine's devices, each to those of the rank beside it, in its shardings;
dispatches and returns at once.
"""


class _Item(NamedTuple):
    ticket: Ticket
    part: Part


class _Packet(NamedTuple):
    items: list[_Item]
    arrays: list[Any]
    started: float


class _Source:
    """A source's parts on their way to the targets."""

    def __init__(self, name: str):
        self.name = name
        self.closed = False
        self.computing: deque[_Item] = deque()

    @property
    def idle(self) -> bool:
        return not self.computing


class _Target:
    """A target's parts, from computed to handed over."""

    def __init__(self, name: str, deliver: Deliver):
        self.name = name
        self.closed = False
        self.deliver = deliver
        self.ready: deque[_Item] = deque()
        self.flying: deque[_Packet] = deque()
        self.wire: list[tuple[float, int, _Item]] = []  # heap of late copies by arrival
        self.overtaken: list[tuple[float, _Item]] = []  # arrive after the next part
        self.free_at = 0.0

    @property
    def idle(self) -> bool:
        return not (self.ready or self.flying or self.wire or self.overtaken)

    @property
    def due(self) -> float | None:
        """When the next late copy arrives."""
        times = [entry[0] for entry in (*self.wire[:1], *self.overtaken)]
        return min(times, default=None)


class LocalTransport(KVTransport):
    """Transport between endpoints of this process.

    Args:
        place: of each endpoint that receives, what moves pytrees to its devices.
        clock: seconds.
        merge_bytes: parts below this are merged while their packet stays below it.
        outstanding: packets under way to a target at once.
        quarantine: for memory that is still written when its transfer ended; default 8 GiB, 60 s.
        faults: what goes wrong on purpose.
        threads: False leaves all work to `step`, for tests and simulations under a fake clock.
    """

    def __init__(
        self,
        place: Mapping[str, Place],
        *,
        clock: Callable[[], float] = time.monotonic,
        merge_bytes: int = 64 << 20,
        outstanding: int = 4,
        quarantine: Quarantine | None = None,
        faults: Faults | None = None,
        threads: bool = True,
    ):
        self._place = dict(place)
        self._clock = clock
        self._merge_bytes = merge_bytes
        self._outstanding = outstanding
        self._quarantine = quarantine or Quarantine(8 << 30, 60.0)
        self._faults = faults or Faults()
        self._ledger = Ledger(clock, self._quarantine, self._faults, self._changed)
        self._wake = threading.Condition()  # guards what follows and the sides' queues
        self._version = 0  # counts changes, so that none is missed between a step and a wait
        self._endpoints: dict[str, Endpoint] = {}
        self._sources: dict[str, _Source] = {}
        self._targets: dict[str, _Target] = {}
        self._sides: list[_Source | _Target] = []  # those of earlier incarnations included
        self._order = itertools.count()
        self._threaded = threads
        self._threads: list[threading.Thread] = []

    # --- what coordinator and engines call ------------------------------------------------------

    def register(self, endpoint: Endpoint, deliver: Deliver) -> None:
        """See `KVTransport.register`."""
        self.unregister(endpoint.name)
        source, target = _Source(endpoint.name), _Target(endpoint.name, deliver)
        with self._wake:
            self._endpoints[endpoint.name] = endpoint
            self._sources[endpoint.name] = source
            self._targets[endpoint.name] = target
            self._sides = [s for s in self._sides if not (s.closed and s.idle)] + [source, target]
        if self._threaded:
            self._start(f"kv-from-{endpoint.name}", source)
            self._start(f"kv-to-{endpoint.name}", target)

    def unregister(self, name: str) -> None:
        """See `KVTransport.unregister`."""
        self._ledger.fail_endpoint(name)
        with self._wake:
            self._endpoints.pop(name, None)
            for side in (self._sources.pop(name, None), self._targets.pop(name, None)):
                if side is not None:
                    side.closed = True
            self._changed_queues()
        self._ledger.fail_endpoint(name)  # what was opened in between

    def check(self, source: str, target: str) -> None:
        """See `KVTransport.check`."""
        with self._wake:
            one, other = self._endpoints[source], self._endpoints[target]
        one.check(other)

    def open(self, ticket: Ticket) -> None:
        """See `KVTransport.open`."""
        self.check(ticket.source, ticket.target)
        self._ledger.open(ticket)

    def push(self, ticket: Ticket, part: Part) -> bool:
        """See `KVTransport.push`."""
        if not self._ledger.push(ticket, part):
            return False
        with self._wake:
            source = self._sources.get(ticket.source)
            if source is not None:
                source.computing.append(_Item(ticket, part))
                self._changed_queues()
                return True
        self._ledger.fail(ticket, f"engine {ticket.source} is gone")
        return self._ledger.still_wanted(ticket, part)  # no: it failed

    def acknowledge(self, transfer_id: str, index: int, ok: bool) -> None:
        """See `KVTransport.acknowledge`."""
        self._ledger.acknowledge(transfer_id, index, ok)

    def poll(self, transfer_id: str) -> Progress:
        """See `KVTransport.poll`."""
        return self._ledger.poll(transfer_id)

    def cancel(self, transfer_id: str) -> CancelResult:
        """See `KVTransport.cancel`."""
        return self._ledger.cancel(transfer_id)

    def close(self, transfer_id: str) -> None:
        """See `KVTransport.close`."""
        self._ledger.close(transfer_id)

    def heartbeat(self, transfer_ids: Iterable[str]) -> None:
        """See `KVTransport.heartbeat`."""
        self._ledger.heartbeat(transfer_ids)

    def expired(self, source: str) -> list[str]:
        """See `KVTransport.expired`."""
        return self._ledger.expired(source)

    def backlog(self, source: str) -> int:
        """See `KVTransport.backlog`."""
        return self._ledger.backlog(source)

    @property
    def healthy(self) -> bool:
        """See `KVTransport.healthy`."""
        return self._quarantine.healthy(self._clock())

    @property
    def stats(self) -> Stats:
        """Sums since the start; do not change them."""
        return self._ledger.stats

    def timeline(self, transfer_id: str) -> Timeline:
        """See `KVTransport.timeline`."""
        return self._ledger.timeline(transfer_id)

    def shutdown(self) -> None:
        """See `KVTransport.shutdown`; returns when the threads have ended."""
        for name in list(self._endpoints):
            self.unregister(name)
        for thread in self._threads:
            thread.join()

    # --- the work -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Does one piece of work, without threads; whether there was any that could be done."""
        return any(self._step(side) for side in list(self._sides))

    def _step(self, side: _Source | _Target) -> bool:
        return self._step_source(side) if isinstance(side, _Source) else self._step_target(side)

    def _changed(self, transfer_id: str) -> None:
        if self.notify is not None:
            self.notify(transfer_id)

    def _changed_queues(self) -> None:
        self._version += 1
        self._wake.notify_all()

    def _start(self, name: str, side: _Source | _Target) -> None:
        thread = threading.Thread(target=self._run, args=(side,), name=name, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _run(self, side: _Source | _Target) -> None:
        version = -1
        while True:
            if self._step(side):
                continue
            with self._wake:
                if side.closed and side.idle:
                    return
                if version == self._version:
                    due = side.due if isinstance(side, _Target) else None
                    self._wake.wait(None if due is None else max(0.0, due - self._clock()))
                version = self._version

    def _step_source(self, source: _Source) -> bool:
        """Waits for the oldest part's arrays."""
        with self._wake:
            if not source.computing:
                return False
            item = source.computing.popleft()
        if not self._ledger.still_wanted(*item):
            return True
        try:
            jax.block_until_ready((item.part.arrays, item.part.checksum))
        except Exception as error:  # the source's computation failed: this transfer's problem only
            log.exception("transfer %s: the source failed", item.ticket.transfer_id)
            self._ledger.fail(item.ticket, f"the source failed: {error}")
        self._ledger.computed(*item)
        with self._wake:
            target = self._targets.get(item.ticket.target)
            if target is not None:
                target.ready.append(item)
                self._changed_queues()
                return True
        self._ledger.fail(item.ticket, f"engine {item.ticket.target} is gone")
        self._ledger.still_wanted(*item)
        return True

    def _step_target(self, target: _Target) -> bool:
        """Sends a packet while there is room, else completes the oldest, else delivers."""
        if len(target.flying) < self._outstanding and (items := self._take(target)):
            self._send(target, items)
            return True
        if target.flying:
            self._complete(target, target.flying.popleft())
            return True
        now = self._clock()
        if target.wire and target.wire[0][0] <= now:
            self._hand_over(target, heapq.heappop(target.wire)[2])
            return True
        late = [item for due, item in target.overtaken if due <= now]
        target.overtaken = [entry for entry in target.overtaken if entry[0] > now]
        for item in late:
            self._hand_over(target, item)
        return bool(late)

    def _take(self, target: _Target) -> list[_Item]:
        """The next packet: one large part, or small ones that wait together."""
        items, nbytes = [], 0
        with self._wake:
            while target.ready:
                size = target.ready[0].part.nbytes
                if items and nbytes + size > self._merge_bytes:
                    break
                item = target.ready.popleft()
                if self._ledger.still_wanted(*item):
                    items.append(item)
                    nbytes += size
        return items

    def _send(self, target: _Target, items: list[_Item]) -> None:
        started = self._clock()
        try:
            arrays = self._place[target.name](
                [item.part.arrays for item in items],
                [item.ticket.target_rank for item in items],
            )
        except Exception as error:  # out of memory, a lost device: these transfers' problem only
            self._lose(target, items, error)
            return
        target.flying.append(_Packet(items, arrays, started))

    def _lose(self, target: _Target, items: list[_Item], error: Exception) -> None:
        log.exception("a packet of %d parts to %s was lost", len(items), target.name)
        for item in items:
            self._ledger.fail(item.ticket, f"sending to {target.name} failed: {error}")
            self._ledger.sent(*item, 0.0, 0)

    def _complete(self, target: _Target, packet: _Packet) -> None:
        items = packet.items
        try:
            jax.block_until_ready(packet.arrays)
        except Exception as error:
            self._lose(target, items, error)
            return
        # Packets under way together share the wire: each one's time begins when the last one ended.
        now = self._clock()
        seconds = now - max(packet.started, target.free_at)
        target.free_at = now
        shares = self._ledger.count_packet(items, seconds)
        for item, arrays, share in zip(items, packet.arrays, shares, strict=True):
            self._land(target, item, arrays, share, now)

    def _land(self, target: _Target, item: _Item, arrays: Any, seconds: float, now: float) -> None:
        """A part has arrived: hands it over, unless a fault says otherwise."""
        ticket, part = item
        fate = self._faults.fate(ticket, part)
        self._ledger.sent(ticket, part, seconds, len(fate.copies))
        held, target.overtaken = target.overtaken, []
        for late, corrupt in zip(fate.copies, fate.corrupt, strict=True):
            placed = corrupt_arrays(arrays) if corrupt else arrays
            copy = _Item(ticket, dataclasses.replace(part, arrays=placed))
            if fate.reorder is not None:
                target.overtaken.append((now + fate.reorder, copy))
            elif late:
                heapq.heappush(target.wire, (now + late, next(self._order), copy))
            else:
                self._hand_over(target, copy)
        for _, copy in held:
            self._hand_over(target, copy)

    def _hand_over(self, target: _Target, copy: _Item) -> None:
        """Gives a copy to the engine, unless that has gone or begun anew.

        A transfer that failed meanwhile is delivered all the same, as on any real wire: its pages
        are not reused before the ledger calls it quiescent.
        """
        delivered = not target.closed
        if delivered:
            try:
                target.deliver(*copy)
            except Exception as error:  # the engine's problem with this transfer, not the thread's
                log.exception("engine %s did not take a part", target.name)
                self._ledger.fail(copy.ticket, f"{target.name} did not take it: {error}")
                delivered = False
        self._ledger.arrive(*copy, delivered)
