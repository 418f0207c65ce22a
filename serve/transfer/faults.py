"""What goes wrong on purpose: faults at every step of a transfer, by script or by seed.

A script is a list of rules, each used up after `times` matches. Rates draw from one generator; the
same calls in the same order give the same faults.
"""

import dataclasses
import enum
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serve.transfer.states import TransferState
from serve.transfer.transport import Part, Ticket


class Fault(enum.StrEnum):
    """Kinds of fault."""

    DROP = "drop"  # a part never arrives
    DELAY = "delay"  # a part arrives `seconds` later, cancelled or not
    DUPLICATE = "duplicate"  # a part arrives twice, the second time `seconds` later
    REORDER = "reorder"  # a part arrives after the next one to the same target, or `seconds` later
    CORRUPT = "corrupt"  # bytes of a part are changed
    FAIL_PUSH = "fail-push"  # handing a part over fails
    FAIL_STATE = "fail-state"  # the transfer fails as it enters `state`
    LOSE_ACK = "lose-ack"  # the target's acknowledgement is lost


@dataclasses.dataclass(kw_only=True, slots=True)
class Rule:
    """One line of a script.

    Attributes:
        fault: what happens.
        transfer: the transfer id it happens to; None is any.
        part: the part's index; None is any.
        state: of FAIL_STATE.
        seconds: of DELAY, DUPLICATE and REORDER.
        times: how often, before the rule is used up.
    """

    fault: Fault
    transfer: str | None = None
    part: int | None = None
    state: TransferState | None = None
    seconds: float = 0.0
    times: int = 1


class Fate(NamedTuple):
    """What happens to a part on the wire.

    Attributes:
        copies: of each copy that arrives, the seconds it comes late; none if the part is lost.
        corrupt: of each copy, whether its bytes are changed.
        reorder: None, or the seconds for which all of it waits for a next part.
    """

    copies: tuple[float, ...]
    corrupt: tuple[bool, ...]
    reorder: float | None = None


class Faults:
    """Decides about every step of every transfer.

    Args:
        rules: a script.
        rates: fault -> probability of it at each chance.
        seed: of the draws.
        seconds: longest delay drawn by rate; each is uniform from 0.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        *,
        rates: Mapping[Fault, float] | None = None,
        seed: int = 0,
        seconds: float = 0.1,
    ):
        self.injected: Counter[Fault] = Counter()
        self._rules = list(rules)
        self._rates = dict(rates or {})
        self._random = random.Random(seed)
        self._seconds = seconds
        self._lock = threading.Lock()

    @classmethod
    def parse(cls, text: str) -> "Faults":
        """Reads 'drop=0.05,delay=0.1,seconds=0.5,seed=3': rates, and optionally delay and seed.

        Raises:
            ValueError: a name is unknown or a rate is not in [0, 1].
        """
        rates, seed, seconds = {}, 0, 0.1
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            if name not in [*Fault, "seconds", "seed"]:
                names = ", ".join([*Fault, "seconds", "seed"])
                raise ValueError(f"{item!r}: use name=value with one of {names}")
            try:
                number = int(value) if name == "seed" else float(value)
            except ValueError:
                raise ValueError(f"{item!r}: {value!r} is not a number") from None
            if name == "seed":
                seed = int(number)
            elif name == "seconds":
                seconds = number
            elif 0 <= number <= 1:
                rates[Fault(name)] = number
            else:
                raise ValueError(f"{item!r}: a rate is 0 to 1")
        return cls(rates=rates, seed=seed, seconds=seconds)

    def add(self, rule: Rule) -> None:
        """Adds a line to the script."""
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        """From here on nothing goes wrong."""
        with self._lock:
            self._rules.clear()
            self._rates.clear()

    def fail_push(self, ticket: Ticket, part: Part) -> bool:
        """Whether handing the part over fails."""
        return self._hit(Fault.FAIL_PUSH, ticket, part.index) is not None

    def fail_at(self, ticket: Ticket, state: TransferState) -> bool:
        """Whether the transfer fails as it enters `state`."""
        return self._hit(Fault.FAIL_STATE, ticket, None, state) is not None

    def lose_ack(self, ticket: Ticket, index: int) -> bool:
        """Whether the acknowledgement of the part is lost."""
        return self._hit(Fault.LOSE_ACK, ticket, index) is not None

    def fate(self, ticket: Ticket, part: Part) -> Fate:
        """What happens to the part on the wire."""
        drop = self._hit(Fault.DROP, ticket, part.index)
        delay = self._hit(Fault.DELAY, ticket, part.index)
        twice = self._hit(Fault.DUPLICATE, ticket, part.index)
        corrupt = self._hit(Fault.CORRUPT, ticket, part.index) is not None
        reorder = self._hit(Fault.REORDER, ticket, part.index)
        if drop is not None:
            return Fate((), ())
        copies = (delay or 0.0,) if twice is None else (delay or 0.0, (delay or 0.0) + twice)
        return Fate(copies, (corrupt,) + (False,) * (len(copies) - 1), reorder)

    def _hit(
        self, fault: Fault, ticket: Ticket, part: int | None, state: TransferState | None = None
    ) -> float | None:
        """Seconds if it happens, else None."""
        with self._lock:
            for rule in self._rules:
                if (
                    rule.fault is fault
                    and rule.times > 0
                    and rule.transfer in (None, ticket.transfer_id)
                    and rule.part in (None, part)
                    and rule.state in (None, state)
                ):
                    rule.times -= 1
                    self.injected[fault] += 1
                    return rule.seconds
            rate = self._rates.get(fault, 0.0)
            if rate and self._random.random() < rate:
                self.injected[fault] += 1
                return self._random.uniform(0, self._seconds)
        return None
