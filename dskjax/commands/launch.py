"""`dskjax launch`: one command in several processes that compute as one."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from dskjax.distributed import Membership

GRACE = 10.0
"""Seconds that the other processes get to end after one has failed."""


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    arguments: Sequence[str],
    *,
    processes: int,
    environment: Mapping[str, str],
    coordinator: str | None = None,
    first: int = 0,
    total: int | None = None,
    gpus_per_process: int = 0,
) -> int:
    """Runs `python -m dskjax ARGUMENTS...` in processes of this host and waits for them.

    Output of process 0 goes to stdout; stderr of each is passed on line by line under its number.
    When one fails the others are ended.

    Args:
        arguments: the command line, global options first.
        processes: how many to start here.
        environment: of each, to which its place is added.
        coordinator: HOST:PORT of process 0; a free port of this host when None.
        first: number of the first process of this host.
        total: processes on all hosts; those of this host when None.
        gpus_per_process: GPUs of each process, in order; 0 leaves every process all devices.

    Returns:
        The exit code of the first process that failed, else 0.

    Raises:
        ValueError: sizes that do not fit together, or several hosts without a coordinator.
    """
    total = processes if total is None else total
    if processes < 1 or not 0 <= first <= total - processes:
        raise ValueError(
            f"{processes} processes from number {first} do not fit into {total} in all; give "
            "--processes per host, --first-process of this host and --total-processes"
        )
    if coordinator is None:
        if total > processes:
            raise ValueError("several hosts need --coordinator HOST:PORT, the same on each")
        coordinator = f"127.0.0.1:{free_port()}"
    started = []
    for index in range(processes):
        gpus = range(index * gpus_per_process, (index + 1) * gpus_per_process)
        place = Membership(
            coordinator=coordinator,
            processes=total,
            process=first + index,
            local_devices=tuple(gpus) or None,
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dskjax", *arguments],
                env={**environment, **place.environment()},
                stdout=None if place.process == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    readers = [
        threading.Thread(target=_pass_on, args=(one, first + index), daemon=True)
        for index, one in enumerate(started)
    ]
    for reader in readers:
        reader.start()
    try:
        code = _wait(started)
    finally:
        _end(started)
    for reader in readers:
        reader.join(GRACE)
    return code


def _pass_on(process: subprocess.Popen, number: int) -> None:
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            sys.stderr.write(f"[{number}] {line}")
            sys.stderr.flush()


def _wait(started: Sequence[subprocess.Popen]) -> int:
    """Until all have ended well or one has not; its exit code."""
    while True:
        codes = [one.poll() for one in started]
        if failed := [code for code in codes if code]:
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(started: Sequence[subprocess.Popen]) -> None:
    for one in started:
        if one.poll() is None:
            one.terminate()
    until = time.monotonic() + GRACE
    for one in started:
        try:
            one.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
