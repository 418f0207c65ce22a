"""A transport between a source and a target of plain arrays, under a fake clock, no threads."""

import numpy as np

from serve.transfer.checks import checksum
from serve.transfer.faults import Faults
from serve.transfer.local import LocalTransport
from serve.transfer.transport import Endpoint, KVForm, Mode, Part, Ticket

FORM = KVForm(
    model="m",
    dtype="float32",
    kv_dtype="float32",
    page_size=4,
    layers=2,
    latent=8,
    rope=2,
    mtp_scheme="chain",
    mtp_depth=1,
    page_bytes=320,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Bench:
    """A source and a target whose parts are plain arrays; moving a packet takes time."""

    def __init__(self, *, rules=(), seconds=0.0, **options):
        self.clock = Clock()
        self.seconds = seconds
        self.packets, self.delivered, self.changed = [], [], []
        self.transport = LocalTransport(
            {"d": self.place, "p": self.place},
            clock=self.clock,
            threads=False,
            faults=Faults(rules),
            **options,
        )
        self.transport.notify = self.changed.append
        self.transport.register(Endpoint("p", FORM), lambda *part: None)
        self.transport.register(Endpoint("d", FORM), lambda *part: self.delivered.append(part))

    def place(self, packet, ranks):
        self.packets.append(len(packet))
        self.clock.now += self.seconds
        return packet

    def open(self, request="r", generation=0, tokens=10, skip=0, mode=Mode.WHOLE):
        ticket = Ticket(
            request_id=request,
            generation=generation,
            source="p",
            target="d",
            tokens=tokens,
            skip_tokens=skip,
            page_size=4,
            layers=2,
            page_bytes=320,
            mode=mode,
            deadline=100.0,
            lease=30.0,
        )
        self.transport.open(ticket)
        return ticket

    def push(self, ticket, index=0, last=True, layers=(0, 2), pages=None, nbytes=100):
        return self.transport.push(ticket, part(index, last, layers, pages or ticket.pages, nbytes))

    def run(self):
        while self.transport.step():
            pass

    def acknowledge(self, ok=True):
        delivered, self.delivered = self.delivered, []
        for ticket, p in delivered:
            self.transport.acknowledge(ticket.transfer_id, p.index, ok)

    def state(self, ticket):
        return self.transport.poll(ticket.transfer_id).state


def part(index=0, last=True, layers=(0, 2), pages=(0, 3), nbytes=100):
    arrays = np.full((2, 3), index, np.int32)
    return Part(
        index=index,
        is_last=last,
        layers=layers,
        pages=pages,
        arrays=arrays,
        checksum=checksum([arrays]),
        nbytes=nbytes,
    )
