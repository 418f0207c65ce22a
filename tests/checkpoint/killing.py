"""Kills a conversion at every step that it takes, and goes on. Run as a program.

    python -m tests.checkpoint.killing SOURCE FOLDER OPTIONS STRIDE

Each attempt is a child process, forked before JAX has any threads. Prints JSON: for each STRIDEth
step, before which the child was killed, whether the target was there, and how many weights the next
child read.
"""

import functools
import itertools
import json
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dskjax.checkpoint import Conversion, convert
from dskjax.checkpoint.from_hub import HubSource
from dskjax.checkpoint.from_orbax import OrbaxSource


def count(owner: object, name: str, step: Callable[[], None]) -> None:
    """Calls `step` before each call of a function."""
    call = getattr(owner, name)

    def counted(*args, **kwargs):
        step()
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def child(work: Callable[[], None]) -> int:
    """Runs something in a process of its own; returns its wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        work()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a child that is killed before its step of that number; false: it ended."""

    def run() -> None:
        steps = iter(range(1, number + 1))

        def step() -> None:
            if next(steps, number) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        for owner, name in [
            (os, "fsync"),
            (os, "mkdir"),
            (os, "rmdir"),
            (os, "unlink"),
            (pathlib.Path, "rename"),
            (HubSource, "read"),
            (OrbaxSource, "read"),
        ]:
            count(owner, name, step)
        work()

    status = child(run)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def go_on(source: Path, target: Path, conversion: Conversion, there: bool) -> int:
    """Converts in a child; returns how many weights it read."""
    log = target.with_suffix(".log")

    def run() -> None:
        with log.open("w") as file:
            for owner in (HubSource, OrbaxSource):
                count(owner, "read", lambda: print(1, file=file, flush=True))
            try:
                convert(source, target, conversion)
            except FileExistsError:  # killed after the last step that matters
                assert there

    status = child(run)
    assert status == 0, (target, status)
    return len(log.read_text().splitlines())


def attempts(
    source: Path, folder: Path, conversion: Conversion, stride: int
) -> Iterator[dict[str, object]]:
    for number in itertools.count(1, stride):
        target = folder / f"at{number}"
        if not killed_at(number, functools.partial(convert, source, target, conversion)):
            return
        there = target.exists()
        yield {"there": there, "read": go_on(source, target, conversion, there)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # about forks
    _, source, folder, options, stride = sys.argv
    conversion = Conversion(**json.loads(options))
    print(json.dumps([*attempts(Path(source), Path(folder), conversion, int(stride))]))
