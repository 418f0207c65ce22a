"""How many requests GPUs can serve within a limit of milliseconds a token, from measured times of
steps: prefill and decode on the same GPUs, or on halves of their own.

Nothing waits in a queue and every batch is full, so no server reaches these rates; they say which
of the two arrangements the times favour.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """What is served.

    Attributes:
        prompt: tokens of a prompt.
        output: tokens of an answer.
    """

    prompt: int
    output: int


class Goodput(NamedTuple):
    """The best that a limit allows.

    Attributes:
        output: tokens a second and GPU; 0 where nothing keeps the limit.
        batch: sequences of a decoding GPU.
        tpot_ms: milliseconds a token.
    """

    output: float
    batch: int
    tpot_ms: float


NOTHING = Goodput(0.0, 0, 0.0)
Row = Mapping[str, Any]
"""A row of `mesh_times.measure`."""


def together(decode: Sequence[Row], mixed: Sequence[Row], what: Requests, limit: float) -> Goodput:
    """All GPUs do both: as many steps carry a chunk of a prompt as the finished ones are to be
    replaced.

    Args:
        decode: steps without a chunk.
        mixed: steps with one, of the same batches.
        what: the requests.
        limit: milliseconds a token.
    """
    best = NOTHING
    with_chunk = {row["batch"]: row for row in mixed}
    for row in decode:
        other = with_chunk.get(row["batch"])
        if other is None:
            continue
        new = row["batch"] * row["tokens"]
        part = new / what.output * what.prompt / other["chunk"]
        if part > 1:  # not even a chunk in every step would do
            continue
        us = part * other["step_us"]["median"] + (1 - part) * row["step_us"]["median"]
        best = max(best, _within(limit, us, row, 1e6 * new / us))
    return best


def apart(
    decode: Sequence[Row],
    prefill: Sequence[Row],
    what: Requests,
    limit: float,
    *,
    share: float = 0.5,
) -> Goodput:
    """A share of the GPUs prefills, the others decode; the slower side sets the pace.

    Args:
        decode: steps on the decoding GPUs.
        prefill: steps on the prefilling ones.
        what: the requests.
        limit: milliseconds a token.
        share: of GPUs that prefill.
    """
    prefilled = max((row["prefilled_per_second_per_gpu"] for row in prefill), default=0.0)
    most = share * prefilled / what.prompt * what.output
    best = NOTHING
    for row in decode:
        us = row["step_us"]["median"]
        rate = (1 - share) * 1e6 * row["batch"] * row["tokens"] / us
        best = max(best, _within(limit, us, row, min(rate, most)))
    return best


def _within(limit: float, us: float, row: Row, output: float) -> Goodput:
    tpot = us / row["tokens"] / 1e3
    return Goodput(output, row["batch"], tpot) if tpot <= limit else NOTHING
