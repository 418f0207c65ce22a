"""The interface of a KV transport, and the plain data that passes through it. No JAX, no threads.

A transfer goes: open (coordinator) -> push of one or more parts (source engine) -> the target's
`deliver` callback -> acknowledge of each part (coordinator, when the target has installed it and
compared checksums) -> SUCCESS. Everything moves in one normal form, [layers, pages, page, width]
per cache leaf; each side converts, so the two may be sharded in any way.

Rules of every backend:
- no call blocks; what is not done yet shows in `poll`;
- a part that was pushed and not recalled in time arrives, also after a cancellation: memory of
  both sides may be reused only when `cancel` or `poll().quiescent` says so;
- a transfer that lost, repeated or damaged a part never reaches SUCCESS.
"""

import abc
import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from serve.transfer.states import CancelResult, TransferState


class IncompatibleError(ValueError):
    """Two engines hold their caches in different forms; nothing was sent."""


class Mode(enum.StrEnum):
    """How a request's pages are cut into parts."""

    WHOLE = "whole"  # one part, after the prefill; merged with other requests' parts
    LAYERWISE = "layerwise"  # a part per chunk and layer group, while later groups still compute


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KVForm:
    """Everything that must be equal for one engine's pages to mean the same in another.

    Not the mesh: pages travel in the normal form.

    Attributes:
        model: name or hash of config and weights.
        dtype: of the compute, which the hidden states travel in.
        kv_dtype: of the cache.
        page_size: tokens a page.
        layers: layers of the pool, MTP layers included.
        latent, rope: widths of a token's row.
        mtp_scheme: how drafts are made; it decides what the MTP layers' rows hold.
        mtp_depth: last hidden states that travel with a request.
        page_bytes: bytes of one page over all layers and leaves.
    """

    model: str
    dtype: str
    kv_dtype: str
    page_size: int
    layers: int
    latent: int
    rope: int
    mtp_scheme: str
    mtp_depth: int
    page_bytes: int

    @property
    def digest(self) -> str:
        """Hex digest over all fields."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def differences(self, other: "KVForm") -> list[str]:
        """'field: mine != theirs' for every field that differs."""
        names = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """An engine as a transport knows it; `compatibility` is compared before any byte moves."""

    name: str
    form: KVForm

    @property
    def compatibility(self) -> str:
        """Digest of the form."""
        return self.form.digest

    def check(self, other: "Endpoint") -> None:
        """Compares two endpoints.

        Raises:
            IncompatibleError: they differ; names both and every field that differs.
        """
        if self.compatibility != other.compatibility:
            raise IncompatibleError(
                f"engines {self.name} ({self.compatibility[:12]}) and {other.name} "
                f"({other.compatibility[:12]}) hold their caches differently: "
                + "; ".join(self.form.differences(other.form))
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """One attempt to move one request's pages.

    Attributes:
        request_id: the client's request.
        generation: counts attempts; parts of an older one are never taken for a newer one's.
        source, target: engine names.
        tokens: known tokens when the prefill was ordered, all of whose rows the target needs.
        skip_tokens: of these, from the front, those that the target's prefix cache holds.
        page_size: tokens a page; divides `skip_tokens`.
        layers: layers of the pool.
        page_bytes: bytes of a page over all layers.
        mode: how it is cut.
        deadline: seconds on the coordinator's clock, when it gives the attempt up.
        lease: seconds for which the source holds its pages after the last sign of life.
        target_rank: rank of the target that has reserved room; 0 where there are no ranks.

    Raises:
        ValueError: a count is out of range.
    """

    request_id: str
    generation: int
    source: str
    target: str
    tokens: int
    skip_tokens: int
    page_size: int
    layers: int
    page_bytes: int
    mode: Mode
    deadline: float
    lease: float = 30.0
    target_rank: int = 0

    def __post_init__(self):
        if self.tokens < 1 or not 0 <= self.skip_tokens <= self.tokens:
            raise ValueError(f"{self.skip_tokens=} must be 0 to {self.tokens=}, which is positive")
        if self.skip_tokens % self.page_size:
            raise ValueError(f"{self.skip_tokens=} must be a multiple of {self.page_size=}")

    @property
    def transfer_id(self) -> str:
        """Request id and generation; the id under which both engines know the attempt."""
        return attempt_id(self.request_id, self.generation)

    @property
    def pages(self) -> tuple[int, int]:
        """Page offsets [from, to) within the sequence that are to be moved; may be empty."""
        return self.skip_tokens // self.page_size, -(-self.tokens // self.page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of these pages."""
        first, end = self.pages
        return (end - first) * self.page_bytes


def attempt_id(request_id: str, generation: int) -> str:
    """The id of one attempt at a request."""
    return f"{request_id}#{generation}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A rectangle of a transfer: some layers of some pages.

    Attributes:
        index: counts a transfer's parts from 0.
        is_last: no further index follows; parts may still arrive in any order.
        layers, pages: half-open ranges; pages as in `Ticket.pages`.
        arrays: pytree in the normal form; the last part's also holds the last hidden states.
        checksum: uint32 scalar over `arrays`, on the source's device or an int (see `checks`).
        nbytes: of `arrays`.
        extra: whatever else the target needs, small: first tokens and their log-probabilities.
    """

    index: int
    is_last: bool
    layers: tuple[int, int]
    pages: tuple[int, int]
    arrays: Any
    checksum: Any
    nbytes: int
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def area(self) -> int:
        """Layers times pages; the areas of a complete transfer's parts add up to the whole."""
        return (self.layers[1] - self.layers[0]) * (self.pages[1] - self.pages[0])


class Progress(NamedTuple):
    """What `poll` says.

    Attributes:
        state: of the transfer.
        quiescent: nothing of it is on the wire, and nothing will be before the next `push`; with a
            state that is over, memory of both sides may be reused.
        pushed, delivered, acknowledged: parts; a repeated one counts each time.
        nbytes: bytes delivered.
        why: of FAILED.
    """

    state: TransferState
    quiescent: bool
    pushed: int = 0
    delivered: int = 0
    acknowledged: int = 0
    nbytes: int = 0
    why: str = ""


@dataclasses.dataclass(slots=True)
class Timeline:
    """When things happened to one transfer, seconds on the transport's clock.

    Attributes:
        computed: when the arrays of the last part were ready on the source, or None.
        ended: when the last packet with a part of it had been moved, or None.
        alone: seconds its parts took on the wire: of a packet that several transfers share, the
            share of its bytes.
        merged: a part of it shared a packet with another transfer's.
    """

    computed: float | None = None
    ended: float | None = None
    alone: float = 0.0
    merged: bool = False

    @property
    def overlap(self) -> float | None:
        """The part of the transfer hidden under the source's compute.

        1 - (ended - computed) / alone: 1 if the last byte arrived when the last layer was ready, 0
        if all of it was moved afterwards, negative if it also waited for other transfers. None
        until it is over, or if it took no time.
        """
        if self.computed is None or self.ended is None or self.alone <= 0:
            return None
        return 1 - (self.ended - self.computed) / self.alone


Deliver = Callable[[Ticket, Part], None]


class KVTransport(abc.ABC):
    """Moves parts between registered endpoints. Every method is thread-safe and never blocks.

    Attributes:
        notify: called with a transfer id when its state or its quiescence changed, from any thread;
            a hint that makes the coordinator poll earlier than its next tick. May be set once.
    """

    notify: Callable[[str], None] | None = None

    @abc.abstractmethod
    def register(self, endpoint: Endpoint, deliver: Deliver) -> None:
        """Makes an engine known; the same name again is a new incarnation, as after a restart.

        `deliver` is called from a thread of the transport and must not block. Transfers of an
        earlier incarnation fail.
        """

    @abc.abstractmethod
    def unregister(self, name: str) -> None:
        """Forgets an engine; its transfers fail. Unknown names are ignored."""

    @abc.abstractmethod
    def check(self, source: str, target: str) -> None:
        """Compares two endpoints' forms.

        Raises:
            IncompatibleError: they differ.
            KeyError: one of them is not registered.
        """

    @abc.abstractmethod
    def open(self, ticket: Ticket) -> None:
        """Starts a transfer, when the target has reserved its pages.

        Raises:
            IncompatibleError: the endpoints differ.
            KeyError: one of them is not registered.
            ValueError: the id was opened before.
        """

    @abc.abstractmethod
    def push(self, ticket: Ticket, part: Part) -> bool:
        """Hands over a part; the caller keeps its arrays unchanged until the transfer is over.

        Returns:
            False if the part was not taken, as the transfer is over or was cancelled: there is
            nothing to do about it but to stop.
        """

    @abc.abstractmethod
    def acknowledge(self, transfer_id: str, index: int, ok: bool) -> None:
        """The target has installed a part; `ok` says whether the checksums agree."""

    @abc.abstractmethod
    def poll(self, transfer_id: str) -> Progress:
        """How a transfer stands; of an unknown one FAILED and quiescent."""

    @abc.abstractmethod
    def timeline(self, transfer_id: str) -> Timeline:
        """A copy of a transfer's times.

        Raises:
            KeyError: it was not opened, or was closed.
        """

    @abc.abstractmethod
    def cancel(self, transfer_id: str) -> CancelResult:
        """Ends a transfer; no push is taken afterwards."""

    @abc.abstractmethod
    def close(self, transfer_id: str) -> None:
        """Forgets a transfer that is over and quiescent, or unknown.

        Raises:
            RuntimeError: it is neither.
        """

    @abc.abstractmethod
    def heartbeat(self, transfer_ids: Iterable[str]) -> None:
        """Somebody still wants these: extends their leases."""

    @abc.abstractmethod
    def expired(self, source: str) -> list[str]:
        """Transfers whose lease ran out, for `source` to give their pages back; each named once.

        They fail, so that nobody decodes them; those with parts on the wire are named later.
        """

    @abc.abstractmethod
    def backlog(self, source: str) -> int:
        """Bytes that `source` pushed and that were not moved yet: what it may throttle on."""

    @property
    @abc.abstractmethod
    def healthy(self) -> bool:
        """False when memory in quarantine is over its budget or too old."""

    @abc.abstractmethod
    def shutdown(self) -> None:
        """Stops threads; transfers that are not over fail."""


class Quarantine:
    """Memory whose writer's state is unknown: not reused until acknowledged, within a budget."""

    def __init__(self, budget: int, patience: float):
        """`budget` in bytes; `patience` in seconds, the oldest entry's greatest age."""
        self.budget = budget
        self.patience = patience
        self._held: dict[str, tuple[int, float]] = {}

    def add(self, key: str, nbytes: int, now: float) -> None:
        """Puts memory in; a key that is in keeps its age."""
        if key not in self._held:
            self._held[key] = (nbytes, now)

    def acknowledge(self, key: str) -> None:
        """The writer is known to be done; unknown keys are ignored."""
        self._held.pop(key, None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(nbytes for nbytes, _ in self._held.values())

    def healthy(self, now: float) -> bool:
        """Whether budget and patience hold."""
        oldest = min((since for _, since in self._held.values()), default=now)
        return self.nbytes <= self.budget and now - oldest <= self.patience
