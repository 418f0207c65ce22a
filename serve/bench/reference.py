"""Whether load changes answers: the same greedy requests alone, and again amid the others.

A server that is fast and wrong must not get a good mark. Greedy texts may differ without a defect
where two tokens are as likely as each other to the last bits; from outside that cannot be told from
a defect, so every difference is reported.
"""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from serve.bench.answer import Answer
from serve.bench.load import Send
from serve.bench.workload import Job

MAX_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What was compared.

    Attributes:
        asked: reference requests.
        compared: those that got an answer under load.
        mismatches: number, both texts and the place of the first difference, of each that differs.
    """

    asked: int
    compared: int
    mismatches: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def greedy(jobs: Sequence[Job]) -> list[Job]:
    """The requests, greedy and short."""
    return [
        {**job, "temperature": 0.0, "max_tokens": min(job["max_tokens"], MAX_TOKENS)}
        for job in jobs
    ]


async def ask_alone(send: Send, jobs: Sequence[Job]) -> list[Answer]:
    """Answers one after another.

    Raises:
        ValueError: one failed; a server that answers nobody cannot be measured.
    """
    answers = []
    for job in jobs:
        answer = await send(job)
        if not answer.ok:
            raise ValueError(f"the server fails without load: {answer.error}: {answer.message}")
        answers.append(answer)
    return answers


async def ask_together(send: Send, jobs: Sequence[Job]) -> list[Answer]:
    """Answers to all at once."""
    return list(await asyncio.gather(*(send(job) for job in jobs)))


def compare(alone: Sequence[Answer], loaded: Sequence[Answer]) -> Check:
    """Compares the texts and ends of those that were answered."""
    mismatches = []
    for number, (before, after) in enumerate(zip(alone, loaded, strict=True)):
        if after.ok and (before.text, before.finish) != (after.text, after.finish):
            same = 0
            while before.text[same : same + 1] == after.text[same : same + 1] != "":
                same += 1
            mismatches.append(
                {"prompt": number, "at": same, "alone": before.text, "loaded": after.text}
            )
    compared = sum(answer.ok for answer in loaded)
    return Check(asked=len(alone), compared=compared, mismatches=mismatches)
