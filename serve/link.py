"""An engine's end of the wire: cuts pages into parts and pushes them; installs parts that arrive.

Belongs to the engine's thread: extraction and installation take their place in the order of its
launches, which is what makes reuse of pages safe on either side.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax

from dskjax.decode.slots import Slots
from serve.engine_api import Installed
from serve.plan import Chunk
from serve.request import Request
from serve.runner import Runner
from serve.transfer.checks import PendingChecks
from serve.transfer.pages import PagePrograms
from serve.transfer.pools import Home
from serve.transfer.transport import KVTransport, Mode, Part, Ticket

Where = Callable[[], Home]
"""Where a request is now."""


@runtime_checkable
class Link(Protocol):
    """What an engine needs of its end of the wire."""

    @property
    def checking(self) -> bool:
        """Checksums are still being computed."""
        ...

    def begin(self, ticket: Ticket, request: Request, where: Where) -> None:
        """A request with a ticket is queued; its prefill is still to come."""
        ...

    def complete(self, request_id: str) -> None:
        """The last step of a request that began has been launched: pushes what is missing."""
        ...

    def drop(self, request_id: str) -> None:
        """A request that began ends early; unknown ids are ignored."""
        ...

    def receive(self, ticket: Ticket, part: Part, home: Home | None) -> None:
        """Installs a part; without a home nobody here expects it, and it is dropped."""
        ...

    def installed(self, engine: str) -> list[Installed]:
        """Parts whose fate is known since the last call."""
        ...


@dataclasses.dataclass(slots=True)
class _Sending:
    """A transfer under way; `sent` is the first page whose trunk layers were not pushed yet."""

    ticket: Ticket
    where: Where
    sent: int
    parts: int = 0


class DeviceLink:
    """A `Link` between JAX devices.

    Args:
        runner: whose state is read and written.
        programs: compiled for that state.
        transport: takes the parts.
        trunk_layers: layers of the pool that are not MTP modules'.
    """

    def __init__(
        self, runner: Runner, programs: PagePrograms, transport: KVTransport, trunk_layers: int
    ):
        self._runner, self._programs, self._transport = runner, programs, transport
        self._trunk = trunk_layers
        self._sending: dict[str, _Sending] = {}
        self._checks = PendingChecks()
        self._dropped: list[tuple[str, int, bool]] = []

    @property
    def checking(self) -> bool:
        """See `Link`."""
        return bool(len(self._checks) or self._dropped)

    def begin(self, ticket: Ticket, request: Request, where: Where) -> None:
        """See `Link`."""
        sending = _Sending(ticket, where, ticket.pages[0])
        self._sending[request.id] = sending
        if ticket.mode is Mode.LAYERWISE and self._runner.layerwise is not None:
            self._runner.senders[request.id] = functools.partial(self._send_group, sending)

    def complete(self, request_id: str) -> None:
        """See `Link`."""
        sending = self._sending.get(request_id)
        if sending is None:
            return
        self.drop(request_id)
        first, end = sending.ticket.pages
        layers, sent = self._programs.layers, sending.sent
        if sent > first and layers > self._trunk:  # the modules ran last: all their pages now
            for pages in self._programs.cut(first, sent):
                self._push(sending, self._runner.state, pages, (self._trunk, layers))
        ranges = self._programs.cut(sent, end)
        for pages in ranges:
            last = pages == ranges[-1]
            self._push(sending, self._runner.state, pages, (0, layers), last=last, hidden=True)

    def drop(self, request_id: str) -> None:
        """See `Link`."""
        self._sending.pop(request_id, None)
        self._runner.senders.pop(request_id, None)

    def receive(self, ticket: Ticket, part: Part, home: Home | None) -> None:
        """See `Link`."""
        if home is None:
            self._dropped.append((ticket.transfer_id, part.index, False))
            return
        self._runner.state, actual = self._programs.install(
            self._runner.state,
            part.arrays,
            home,
            part.pages,
            part.layers,
            hidden="hidden" in part.arrays,
        )
        self._checks.add(ticket.transfer_id, part.index, part.checksum, actual)

    def installed(self, engine: str) -> list[Installed]:
        """See `Link`."""
        if not self.checking:
            return []
        known, self._dropped = [*self._dropped, *self._checks.poll()], []
        return [Installed(engine, transfer, index, ok) for transfer, index, ok in known]

    def _send_group(
        self, sending: _Sending, state: Slots, chunk: Chunk, layers: tuple[int, int]
    ) -> None:
        """Pushes the pages that the chunk has filled, for the layers just queued. The page of the
        last token waits for the step that completes it.
        """
        full = (chunk.start + chunk.length) // sending.ticket.page_size
        for pages in self._programs.cut(sending.sent, max(full, sending.sent)):
            self._push(sending, state, pages, layers)
        if layers[1] == self._trunk:
            sending.sent = max(full, sending.sent)

    def _push(
        self,
        sending: _Sending,
        state: Slots,
        pages: tuple[int, int],
        layers: tuple[int, int],
        *,
        last: bool = False,
        hidden: bool = False,
    ) -> None:
        arrays, checksum = self._programs.extract(state, sending.where(), pages, layers, hidden)
        part = Part(
            index=sending.parts,
            is_last=last,
            layers=layers,
            pages=pages,
            arrays=arrays,
            checksum=checksum,
            nbytes=sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)),
        )
        sending.parts += 1
        self._transport.push(sending.ticket, part)
