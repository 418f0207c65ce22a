"""The output thread: batches in, one call a loop and batch out, ends of single answers."""

import asyncio
import logging
import threading

import pytest

from serve.errors import UnavailableError
from serve.metrics import Metrics
from serve.output import OutputThread
from serve.plan import TokenEvent
from serve.request import FinishReason
from serve.text import AnswerText
from tests.serve.text_fakes import TINY, FakeBackend, ids, joined, options, request


class Loop(asyncio.AbstractEventLoop):
    """An event loop as the output thread sees it: runs at once what it is given."""

    def __init__(self):
        self.calls = 0
        self.closed = False
        self.called = threading.Condition()

    def call_soon_threadsafe(self, callback, *args, context=None):  # type: ignore[override]
        if self.closed:
            raise RuntimeError("Event loop is closed")
        with self.called:
            callback(*args)
            self.calls += 1
            self.called.notify_all()

    def wait(self, calls):
        with self.called:
            assert self.called.wait_for(lambda: self.calls >= calls, 10)


class Reader:
    """Subscribes to one request and keeps its pieces."""

    def __init__(self, output, id, loop, **rest):
        self.request = request(id)
        self.pieces = []
        answer = AnswerText(TINY, options(**rest), self.request)
        output.add(self.request, answer, self.pieces.append, loop=loop)

    def event(self, tokens, finish=None, **rest):
        return TokenEvent(self.request, tokens, finish, **rest)

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self):
        return self.pieces[-1].finish if self.pieces else None


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def output(backend):
    output = OutputThread(backend)
    output.start()
    yield output
    output.stop()


def test_a_step_wakes_a_loop_once_for_all_of_its_answers(output):
    loops = [Loop(), Loop()]
    readers = [Reader(output, f"r{i}", loops[i % 2]) for i in range(6)]
    for text in ("one", " two"):
        output.push([r.event(ids(text)) for r in readers])
    for loop in loops:
        loop.wait(2)
    output.push([readers[0].event([], FinishReason.LENGTH)])
    loops[0].wait(3)
    output.stop()
    assert [loop.calls for loop in loops] == [4, 3]  # the last one each: ended by the stop
    assert [r.text for r in readers] == ["one two"] * 6
    assert [r.finish for r in readers] == [FinishReason.LENGTH, *[FinishReason.ABORT] * 5]


def test_a_stop_string_ends_the_request_and_what_still_comes_is_ignored(output, backend):
    loop = Loop()
    reader, other = Reader(output, "a", loop, stop=("END",)), Reader(output, "b", loop)
    output.push([reader.event(ids("some END of it")), other.event(ids("x"))])
    output.push([reader.event(ids("more")), other.event(ids("y"))])
    output.push([reader.event([], FinishReason.STOP), other.event([], FinishReason.LENGTH)])
    loop.wait(3)
    got = joined(reader.pieces)
    assert (got.text, got.finish, got.stop_reason) == ("some ", FinishReason.STOP, "END")
    assert backend.finished == [("a", FinishReason.STOP)]
    assert (other.text, other.finish) == ("xy", FinishReason.LENGTH)
    assert len(output) == 0


def test_an_end_the_engine_knows_of_is_not_told_to_it(output, backend):
    loop = Loop()
    reader = Reader(output, "a", loop, stop=("END",))
    output.push([reader.event(ids("END"), FinishReason.LENGTH)])
    loop.wait(1)
    assert reader.finish is FinishReason.STOP
    assert (backend.finished, backend.aborted) == ([], [])


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_ends_its_answer_and_no_other(output, backend, broken, caplog):
    backend.broken = broken
    loop = Loop()
    bad, good = Reader(output, "bad", loop), Reader(output, "good", loop)
    with caplog.at_level(logging.CRITICAL, logger="serve.output"):
        output.push([bad.event(ids("fine")), good.event(ids("a"))])
        output.push([bad.event([TINY.vocab_size]), good.event(ids("b"))])
        output.push([bad.event(ids("late")), good.event(ids("c"), FinishReason.LENGTH)])
        loop.wait(3)
    assert (bad.text, bad.finish) == ("fine", FinishReason.ERROR)
    assert f"token id {TINY.vocab_size} is out of range" in bad.pieces[-1].message
    assert backend.aborted == ["bad"]
    assert (good.text, good.finish) == ("abc", FinishReason.LENGTH)


def test_a_failing_subscriber_does_not_disturb_its_neighbours(output, caplog):
    loop = Loop()
    bad, good = request("bad"), Reader(output, "good", loop)
    output.add(bad, AnswerText(TINY, options(), bad), lambda piece: 1 / 0, loop=loop)  # type: ignore
    with caplog.at_level(logging.ERROR, logger="serve.output"):
        output.push([TokenEvent(bad, ids("a")), good.event(ids("b"))])
        loop.wait(1)
    assert good.text == "b"
    assert "request bad: its subscriber failed" in caplog.text


def test_a_closed_loop_aborts_its_answers(output, backend, caplog):
    gone, loop = Loop(), Loop()
    gone.closed = True
    lost, ended = Reader(output, "lost", gone), Reader(output, "ended", gone)
    good = Reader(output, "good", loop)
    output.push([lost.event([3]), ended.event([3], FinishReason.LENGTH), good.event(ids("b"))])
    loop.wait(1)
    output.push([lost.event([3]), good.event(ids("c"))])
    loop.wait(2)
    assert backend.aborted == ["lost"]
    assert good.text == "bc" and len(output) == 1


def test_ids_are_unique_until_they_are_free_again(output):
    loop = Loop()
    first = Reader(output, "a", loop)
    with pytest.raises(ValueError, match="'a' is in use"):
        Reader(output, "a", loop)
    assert output.remove("a") and not output.remove("a")
    second = Reader(output, "a", loop)
    output.push([first.event(ids("old")), second.event(ids("new"))])
    loop.wait(1)
    assert (first.text, second.text) == ("", "new")


def test_stop_handles_what_was_pushed_and_ends_what_is_left(backend):
    output = OutputThread(backend)
    loop = Loop()
    reader = Reader(output, "a", loop, stop=("abc",))
    output.push([reader.event(ids("xab"))])
    output.start()
    output.stop()
    assert (reader.text, reader.finish) == ("xab", FinishReason.ABORT)
    with pytest.raises(UnavailableError, match="stopping"):
        Reader(output, "b", loop)


def test_stop_without_start(backend):
    OutputThread(backend).stop()


def test_a_real_loop_and_many_pushing_threads(output):
    count, steps = 8, 50

    async def read():
        loop = asyncio.get_running_loop()
        readers = [Reader(output, f"r{i}", loop) for i in range(count)]

        def work(reader):
            for step in range(steps):
                output.push([reader.event(ids(f" {step}"))])
            output.push([reader.event([], FinishReason.LENGTH)])

        threads = [threading.Thread(target=work, args=(r,)) for r in readers]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(30):
            while not all(r.finish for r in readers):
                await asyncio.sleep(0.001)
        for thread in threads:
            thread.join()
        return [joined(r.pieces).text for r in readers]

    text = "".join(f" {step}" for step in range(steps))
    assert asyncio.run(read()) == [text] * count


def test_times_of_answers_are_measured(backend):
    now = [100.0]
    metrics = Metrics("tiny")
    output = OutputThread(backend, metrics=metrics, clock=lambda: now[0])
    output.start()
    loop = Loop()
    reader = Reader(output, "a", loop)
    reader.request.arrival = 99.5
    aborted, refused = Reader(output, "b", loop), Reader(output, "c", loop)
    output.remove(aborted.request.id)
    output.remove(refused.request.id, counted=False)
    output.push([reader.event([3, 4])])
    loop.wait(1)
    now[0] = 100.3
    output.push([reader.event([5, 6, 7], FinishReason.LENGTH)])
    loop.wait(2)
    output.stop()

    def value(name, **labels):
        return metrics.registry.get_sample_value(f"dskjax:{name}", {"model_name": "tiny", **labels})

    assert value("time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value("inter_token_latency_seconds_sum") == pytest.approx(0.3)
    assert value("inter_token_latency_seconds_count") == 3
    assert value("e2e_request_latency_seconds_sum") == pytest.approx(0.8)
    assert value("prompt_tokens_total") == 3
    assert value("generation_tokens_total") == 5
    ends = {r: value("request_success_total", finished_reason=r.value) for r in FinishReason}
    assert ends == {"length": 1, "abort": 1, "stop": 0, "error": 0}
