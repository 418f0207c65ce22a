"""Reading many tensors in the order in which they lie in their files, by a few threads.

Each thread takes the next job when it is done with one, so at most as many jobs are in flight as
there are threads, and files are read from front to back.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_MOST_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to read.

    Attributes:
        place: name of the file and offset in it, in bytes; jobs run in this order.
        nbytes: bytes of the file that it stands for.
        run: reads them and puts them where they belong.
    """

    place: tuple[str, int]
    nbytes: int
    run: Callable[[], None]


def run(jobs: Iterable[Job], *, title: str, progress: bool, threads: int | None = None) -> None:
    """Runs all jobs and returns when the last one is done.

    Args:
        jobs: in any order.
        title: what is going on, for the progress bar.
        progress: draw one: bytes, bytes a second and time to go.
        threads: how many jobs run at a time; None: one for each processor, at most 8.

    Raises:
        Exception: what the first job to fail raised; no further job is started then.
    """
    ordered = sorted(jobs, key=lambda job: job.place)
    count = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    total = sum(job.nbytes for job in ordered)
    with bar(title, total if progress else None) as report:
        work = _Work(iter(ordered), report)
        helpers = [threading.Thread(target=work.run, daemon=True) for _ in range(count - 1)]
        try:
            for thread in helpers:
                thread.start()
            work.run()
        finally:
            work.stop()
            for thread in helpers:
                thread.join()
    if work.error is not None:
        raise work.error


class _Work:
    """What the threads share."""

    def __init__(self, jobs: Iterator[Job], report: Callable[[int], None]):
        self._jobs, self._report = jobs, report
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Runs jobs until there is none left, or one has failed."""
        while (job := self._next()) is not None:
            try:
                job.run()
            except BaseException as error:
                self.stop(error)
                return
            self._report(job.nbytes)

    def stop(self, error: BaseException | None = None) -> None:
        """Starts no further job."""
        with self._lock:
            self._jobs = iter(())
            self.error = self.error or error

    def _next(self) -> Job | None:
        with self._lock:
            return next(self._jobs, None)


@contextlib.contextmanager
def bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes, bytes a second and time to go; yields what advances it.

    Args:
        title: what is going on.
        total: bytes of the whole; None draws nothing.
    """
    if total is None:
        yield lambda nbytes: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
