"""The states of a transfer, the legal moves between them, and the answers to a cancellation.

Any move that the table does not list raises: a protocol error is found where it is made, not when
a wrong token comes out.
"""

import enum
from collections.abc import Iterable


class TransferState(enum.IntEnum):
    """Where a transfer is. Several ranks agree on the minimum, so that one failure fails all."""

    FAILED = 0
    BOOTSTRAPPING = 1  # the two sides are getting to know each other
    WAITING_FOR_INPUT = 2  # the target has its pages; nothing was pushed yet
    TRANSFERRING = 3  # at least one part was pushed
    SUCCESS = 4  # every part is installed, every checksum agrees, nothing is on the wire

    @property
    def over(self) -> bool:
        """Whether no further state follows."""
        return self in (TransferState.FAILED, TransferState.SUCCESS)


LEGAL: dict[TransferState, frozenset[TransferState]] = {
    TransferState.BOOTSTRAPPING: frozenset({TransferState.WAITING_FOR_INPUT, TransferState.FAILED}),
    TransferState.WAITING_FOR_INPUT: frozenset({TransferState.TRANSFERRING, TransferState.FAILED}),
    TransferState.TRANSFERRING: frozenset({TransferState.SUCCESS, TransferState.FAILED}),
    TransferState.SUCCESS: frozenset(),
    TransferState.FAILED: frozenset(),
}
"""State -> states that may follow it."""


class IllegalTransitionError(RuntimeError):
    """A transfer was moved to a state that cannot follow the one it is in."""


def advance(old: TransferState, new: TransferState) -> TransferState:
    """Returns `new`.

    Raises:
        IllegalTransitionError: `new` cannot follow `old`.
    """
    if new not in LEGAL[old]:
        raise IllegalTransitionError(f"a transfer cannot go from {old.name} to {new.name}")
    return new


def agree(states: Iterable[TransferState]) -> TransferState:
    """The state that several ranks of one side are in together: the minimum.

    Raises:
        ValueError: no rank was given.
    """
    return min(states)


class CancelResult(enum.Enum):
    """What became of a cancellation. `may_free`: whether the caller may reuse the memory now."""

    NOT_FOUND = enum.auto()  # no such transfer
    ALREADY_COMPLETE = enum.auto()  # it was over, and nothing of it is on the wire
    CANCELLED_BEFORE_ADVERTISE = enum.auto()  # nothing of it is or will be on the wire
    CANCEL_REQUESTED_IN_FLIGHT = enum.auto()  # it will be over when what is on the wire has landed
    BACKEND_UNHEALTHY = enum.auto()  # nobody knows what still writes
    NOT_CANCELLABLE = enum.auto()  # the backend cannot stop it; it goes on to its end

    @property
    def may_free(self) -> bool:
        """Whether no writer is left, so that the caller may reuse the memory of both sides."""
        return self in _MAY_FREE


_MAY_FREE = frozenset(
    {
        CancelResult.NOT_FOUND,
        CancelResult.ALREADY_COMPLETE,
        CancelResult.CANCELLED_BEFORE_ADVERTISE,
    }
)
