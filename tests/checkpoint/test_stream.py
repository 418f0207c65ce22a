"""Jobs in the order of the files, a few at a time; the first error ends it all."""

import os
import threading
import time

import pytest

from dskjax.checkpoint import load_hf, stream
from dskjax.checkpoint.stream import Job
from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import write_folder
from tests.checkpoint.quantised import FP8, all_of


def run(jobs, threads=None, progress=False):
    stream.run(jobs, title="a test", progress=progress, threads=threads)


def jobs_of(act, places=((1, 5), (0, 9), (1, 0), (0, 2))):
    """A job for each (file, offset), out of order."""
    return [Job((f"file-{f}", o), 10, lambda f=f, o=o: act((f, o))) for f, o in places]


def test_jobs_run_in_the_order_of_the_files():
    done = []
    run(jobs_of(done.append), threads=1)
    assert done == [(0, 2), (0, 9), (1, 0), (1, 5)]
    run(jobs_of(done.append), threads=3)
    assert sorted(done[4:]) == done[:4]


def test_no_more_jobs_are_in_flight_than_threads():
    lock, flying, most = threading.Lock(), 0, 0

    def act(_):
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.005)
        with lock:
            flying -= 1

    before = set(threading.enumerate())  # other tests' libraries keep threads of their own
    run(jobs_of(act, [(0, i) for i in range(40)]), threads=3)
    assert most == 3 and set(threading.enumerate()) <= before


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_first_error_is_raised_and_nothing_starts_after_it(error, threads):
    started = []

    def act(place):
        started.append(place)
        if place == (0, 5):
            raise error
        time.sleep(0.001)

    before = set(threading.enumerate())
    with pytest.raises(type(error)) as raised:
        run(jobs_of(act, [(0, i) for i in range(1000)]), threads)
    assert raised.value is error
    assert len(started) < 5 + 3 * threads
    assert set(threading.enumerate()) <= before


def test_nothing_to_do_is_done_at_once():
    run([])


def test_progress_is_told_in_bytes(capsys):
    jobs = [Job(("file", i), 1_500_000, lambda: None) for i in range(2)]
    run(jobs, progress=True)
    told = capsys.readouterr().out
    assert "a test" in told and "3.0/3.0 MB" in told
    run(jobs)
    assert not capsys.readouterr().out


def test_files_are_read_from_front_to_back(tmp_path, monkeypatch):
    made = by_hand.make(by_hand.config(FP8), all_of("fp8"))
    write_folder(tmp_path, by_hand.config(FP8), made.tensors, files=3)
    reads, preadv = [], os.preadv

    def noted(handle, buffers, offset):
        got = preadv(handle, buffers, offset)
        reads.append((os.readlink(f"/proc/self/fd/{handle}"), offset, got))
        return got

    monkeypatch.setattr(os, "preadv", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    load_hf(tmp_path)
    values = [read for read in reads if read[1] > 8]  # without the headers
    assert len(values) > 200
    assert values == sorted(values)
    ends = [(file, offset + got) for file, offset, got in values]
    starts = [(file, offset) for file, offset, _ in values]
    assert all(a[0] != b[0] or a <= b for a, b in zip(ends, starts[1:], strict=False))
