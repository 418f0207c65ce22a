"""Sends many requests: at given times whatever comes back, or so many at once.

Times are those of the running event loop, so a loop whose clock jumps runs a test in no time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from serve.bench.answer import Answer
from serve.bench.workload import Job


@runtime_checkable
class Send(Protocol):
    """Sends a request; see `serve.bench.client.Client.send`."""

    def __call__(self, job: Job, *, due: float | None = None) -> Awaitable[Answer]:
        """Its answer, also if it failed."""
        ...


Note = Callable[[], object]
"""Called when something has happened once more."""


async def open_loop(
    send: Send,
    jobs: Sequence[Job],
    offsets: np.ndarray,
    *,
    sent: Note | None = None,
    done: Note | None = None,
) -> list[Answer]:
    """Sends job i at offset i and returns all answers in that order.

    Args:
        send: sends one.
        jobs: what.
        offsets: when, in seconds from now, rising.
        sent: called after each request was sent.
        done: called after each answer.
    """
    start = asyncio.get_running_loop().time()

    async def one(job: Job, offset: float) -> Answer:
        answer = await send(job, due=start + offset)
        if done is not None:
            done()
        return answer

    tasks = []
    async with asyncio.TaskGroup() as group:
        for job, offset in zip(jobs, offsets.tolist(), strict=True):
            wait = start + offset - asyncio.get_running_loop().time()
            await asyncio.sleep(max(wait, 0.0))
            tasks.append(group.create_task(one(job, offset)))
            if sent is not None:
                sent()
    return [task.result() for task in tasks]


async def closed_loop(
    send: Send,
    jobs: Sequence[Job],
    concurrency: int,
    *,
    sent: Note | None = None,
    done: Note | None = None,
) -> list[Answer]:
    """Keeps `concurrency` requests under way until all are answered; answers in order of `jobs`.

    Raises:
        ValueError: a concurrency below 1.
    """
    if concurrency < 1:
        raise ValueError(f"{concurrency=} must be at least 1")
    answers: dict[int, Answer] = {}
    left = iter(enumerate(jobs))

    async def worker() -> None:
        for place, job in left:
            asking = asyncio.ensure_future(send(job))
            if sent is not None:
                sent()
            answers[place] = await asking
            if done is not None:
                done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(worker())
    return [answers[place] for place in range(len(jobs))]
