"""What a transport knows of each transfer. Locked, no threads of its own, no JAX.

Every part is counted on its way: pushed -> sent (it can no longer be recalled) -> delivered or
lost -> acknowledged. A transfer succeeds when each index up to the last one is acknowledged, every
rectangle of layers and pages is covered, each delivery has its acknowledgement, and nothing is on
the wire: a repeated part that is still under way could overwrite rows which the target has decoded
since.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence

from serve.transfer.faults import Faults
from serve.transfer.states import CancelResult, TransferState, advance
from serve.transfer.transport import Mode, Part, Progress, Quarantine, Ticket, Timeline


@dataclasses.dataclass(slots=True)
class Stats:
    """Sums since the start.

    Attributes:
        transfers: by result, "success", "failed" and "cancelled".
        opened: by mode.
        packets, parts: packets sent, and the parts in them.
        merged: parts that shared a packet with another transfer's.
        nbytes, seconds: on the wire; their quotient is the rate.
        expired: leases that ran out.
        overlap_sum, overlap_count: of layerwise transfers that succeeded.
    """

    transfers: dict[str, int] = dataclasses.field(default_factory=dict)
    opened: dict[str, int] = dataclasses.field(default_factory=dict)
    packets: int = 0
    parts: int = 0
    merged: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    expired: int = 0
    overlap_sum: float = 0.0
    overlap_count: int = 0


@dataclasses.dataclass(slots=True)
class _Record:
    ticket: Ticket
    state: TransferState = TransferState.BOOTSTRAPPING
    why: str = ""
    cancelled: bool = False
    areas: dict[int, int] = dataclasses.field(default_factory=dict)
    count: int | None = None
    under_way: int = 0  # copies pushed that are neither delivered nor lost nor recalled
    pushed: int = 0
    delivered: int = 0
    acknowledged: dict[int, int] = dataclasses.field(default_factory=dict)
    nbytes: int = 0
    backlog: int = 0
    lease_until: float | None = None
    expired: bool = False
    line: Timeline = dataclasses.field(default_factory=Timeline)

    @property
    def quiescent(self) -> bool:
        return self.under_way == 0

    @property
    def complete(self) -> bool:
        first, end = self.ticket.pages
        return (
            self.count is not None
            and set(self.acknowledged) == set(range(self.count))
            and sum(self.areas.values()) == self.ticket.layers * (end - first)
            and self.delivered == sum(self.acknowledged.values())
            and self.quiescent
        )


class Ledger:
    """All transfers of one transport.

    Args:
        clock: seconds.
        quarantine: takes the memory of cancelled transfers that have parts on the wire.
        faults: what is to go wrong.
        notify: called with a transfer id when its state or quiescence changed; must not block.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        quarantine: Quarantine,
        faults: Faults,
        notify: Callable[[str], None],
    ):
        self.stats = Stats()
        self._clock = clock
        self._quarantine = quarantine
        self._faults = faults
        self._notify = notify
        self._lock = threading.RLock()
        self._records: dict[str, _Record] = {}

    def open(self, ticket: Ticket) -> None:
        """Starts a transfer.

        Raises:
            ValueError: the id was opened before.
        """
        with self._lock:
            if ticket.transfer_id in self._records:
                raise ValueError(f"transfer {ticket.transfer_id} is open: count up the generation")
            record = self._records[ticket.transfer_id] = _Record(ticket)
            opened = self.stats.opened
            opened[ticket.mode.value] = opened.get(ticket.mode.value, 0) + 1
            if self._faults.fail_at(ticket, TransferState.BOOTSTRAPPING):
                self._fail(record, "injected at BOOTSTRAPPING")
            else:
                self._move(record, TransferState.WAITING_FOR_INPUT)

    def push(self, ticket: Ticket, part: Part) -> bool:
        """Counts a part in; False if it is not to be sent."""
        with self._lock:
            record = self._records.get(ticket.transfer_id)
            if record is None or record.state.over:
                return False
            if record.state is TransferState.WAITING_FOR_INPUT:
                self._move(record, TransferState.TRANSFERRING)
            if not record.state.over and self._faults.fail_push(ticket, part):
                self._fail(record, f"injected: push of part {part.index}")
            if not record.state.over and (part.index in record.areas or record.count is not None):
                self._fail(record, f"part {part.index} was pushed twice or after the last one")
            if record.state.over:
                return False
            record.areas[part.index] = part.area
            record.pushed += 1
            record.under_way += 1
            record.backlog += part.nbytes
            if part.is_last:
                record.count = part.index + 1
                record.lease_until = self._clock() + ticket.lease
            return True

    def computed(self, ticket: Ticket, part: Part) -> None:
        """The arrays of a part are ready on the source."""
        with self._lock:
            if part.is_last and (record := self._records.get(ticket.transfer_id)):
                record.line.computed = self._clock()

    def still_wanted(self, ticket: Ticket, part: Part) -> bool:
        """Whether a part that waits is to go on; if not, it is counted out."""
        with self._lock:
            record = self._records[ticket.transfer_id]
            if record.state.over:
                record.backlog -= part.nbytes
                self._settle(record)
                return False
            return True

    def sent(self, ticket: Ticket, part: Part, seconds: float, copies: int) -> None:
        """A part took `seconds` of a packet and arrives as so many copies: 0 if it was lost."""
        with self._lock:
            record = self._records[ticket.transfer_id]
            record.line.alone += seconds
            record.line.ended = self._clock()
            record.backlog -= part.nbytes
            record.under_way += copies
            self._settle(record)

    def count_packet(self, items: Sequence[tuple[Ticket, Part]], seconds: float) -> list[float]:
        """A packet took so long; returns each part's share of it, by bytes."""
        sizes = [part.nbytes for _, part in items]
        with self._lock:
            self.stats.packets += 1
            self.stats.parts += len(items)
            if len(together := {ticket.transfer_id for ticket, _ in items}) > 1:
                self.stats.merged += len(items)
                for transfer_id in together:
                    self._records[transfer_id].line.merged = True
            self.stats.nbytes += sum(sizes)
            self.stats.seconds += seconds
        return [seconds * size / max(1, sum(sizes)) for size in sizes]

    def arrive(self, ticket: Ticket, part: Part, delivered: bool) -> None:
        """A copy was delivered, or could not be."""
        with self._lock:
            record = self._records[ticket.transfer_id]
            if delivered:
                record.delivered += 1
                record.nbytes += part.nbytes
                self._extend(record)
            self._settle(record)

    def fail(self, ticket: Ticket, why: str) -> None:
        """Something went wrong on the way."""
        with self._lock:
            if (record := self._records.get(ticket.transfer_id)) and not record.state.over:
                self._fail(record, why)

    def fail_endpoint(self, name: str) -> None:
        """An engine is gone: every transfer from or to it fails."""
        with self._lock:
            for record in self._records.values():
                ticket = record.ticket
                if name in (ticket.source, ticket.target) and not record.state.over:
                    self._fail(record, f"engine {name} is gone")

    def acknowledge(self, transfer_id: str, index: int, ok: bool) -> None:
        """The target has installed a copy of a part."""
        with self._lock:
            record = self._records.get(transfer_id)
            if record is None or record.state.over:
                return
            if self._faults.lose_ack(record.ticket, index):
                return
            self._extend(record)
            if not ok:
                self._fail(record, f"the checksum of part {index} does not agree")
                return
            record.acknowledged[index] = record.acknowledged.get(index, 0) + 1
            self._succeed_if_complete(record)

    def poll(self, transfer_id: str) -> Progress:
        """See `KVTransport.poll`."""
        with self._lock:
            record = self._records.get(transfer_id)
            if record is None:
                return Progress(TransferState.FAILED, True, why="no such transfer")
            return Progress(
                record.state,
                record.quiescent,
                record.pushed,
                record.delivered,
                sum(record.acknowledged.values()),
                record.nbytes,
                record.why,
            )

    def timeline(self, transfer_id: str) -> Timeline:
        """A copy of a transfer's times.

        Raises:
            KeyError: no such transfer.
        """
        with self._lock:
            return dataclasses.replace(self._records[transfer_id].line)

    def cancel(self, transfer_id: str) -> CancelResult:
        """See `KVTransport.cancel`."""
        with self._lock:
            record = self._records.get(transfer_id)
            if record is None:
                return CancelResult.NOT_FOUND
            was_over = record.state.over
            if not was_over:
                record.cancelled = True
                self._fail(record, "cancelled")
            if record.quiescent:
                if was_over or record.pushed:
                    return CancelResult.ALREADY_COMPLETE
                return CancelResult.CANCELLED_BEFORE_ADVERTISE
            if not self._quarantine.healthy(self._clock()):
                return CancelResult.BACKEND_UNHEALTHY
            return CancelResult.CANCEL_REQUESTED_IN_FLIGHT

    def close(self, transfer_id: str) -> None:
        """See `KVTransport.close`."""
        with self._lock:
            if (record := self._records.get(transfer_id)) is None:
                return
            if not (record.state.over and record.quiescent):
                raise RuntimeError(f"transfer {transfer_id} is {record.state.name}: cancel it")
            del self._records[transfer_id]

    def heartbeat(self, transfer_ids: Iterable[str]) -> None:
        """See `KVTransport.heartbeat`."""
        with self._lock:
            for transfer_id in transfer_ids:
                if record := self._records.get(transfer_id):
                    self._extend(record)

    def expired(self, source: str) -> list[str]:
        """See `KVTransport.expired`."""
        found = []
        with self._lock:
            now = self._clock()
            for transfer_id, record in self._records.items():
                until = record.lease_until
                late = until is not None and until <= now and record.ticket.source == source
                if not late or record.expired:
                    continue
                if not record.state.over:
                    self._fail(record, f"the lease of {record.ticket.lease} s ran out")
                if record.quiescent:
                    record.expired = True
                    self.stats.expired += 1
                    found.append(transfer_id)
        return found

    def backlog(self, source: str) -> int:
        """See `KVTransport.backlog`."""
        with self._lock:
            return sum(r.backlog for r in self._records.values() if r.ticket.source == source)

    def _extend(self, record: _Record) -> None:
        """To the later of the old end and two thirds of a lease from now."""
        if record.lease_until is not None:
            later = self._clock() + record.ticket.lease * 2 / 3
            record.lease_until = max(record.lease_until, later)

    def _settle(self, record: _Record) -> None:
        """A copy is no longer under way."""
        record.under_way -= 1
        if record.quiescent:
            self._quarantine.acknowledge(record.ticket.transfer_id)
            self._notify(record.ticket.transfer_id)
            if not record.state.over:
                self._succeed_if_complete(record)

    def _succeed_if_complete(self, record: _Record) -> None:
        if record.complete:
            self._move(record, TransferState.SUCCESS)
            if record.state is TransferState.SUCCESS:
                overlap = record.line.overlap
                if record.ticket.mode is Mode.LAYERWISE and overlap is not None:
                    self.stats.overlap_sum += overlap
                    self.stats.overlap_count += 1

    def _move(self, record: _Record, state: TransferState) -> None:
        if self._faults.fail_at(record.ticket, state):
            self._fail(record, f"injected at {state.name}")
            return
        record.state = advance(record.state, state)
        if state.over:
            self._count(record)
        self._notify(record.ticket.transfer_id)

    def _fail(self, record: _Record, why: str) -> None:
        record.state = advance(record.state, TransferState.FAILED)
        record.why = why
        if record.lease_until is None:  # the source may hold pages and nobody to tell it
            record.lease_until = self._clock() + record.ticket.lease
        if not record.quiescent:
            self._quarantine.add(record.ticket.transfer_id, record.ticket.nbytes, self._clock())
        self._count(record)
        self._notify(record.ticket.transfer_id)

    def _count(self, record: _Record) -> None:
        name = "cancelled" if record.cancelled else record.state.name.lower()
        self.stats.transfers[name] = self.stats.transfers.get(name, 0) + 1
