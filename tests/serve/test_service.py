"""The service over a backend without engines: n answers, ends of all kinds, probe and drain."""

import asyncio
import contextlib

import pytest

from dskjax.decode.rules import RuleOptions
from serve.api import Output, TextService
from serve.errors import OverloadedError, UnavailableError
from serve.metrics import Metrics
from serve.plan import TokenEvent
from serve.request import FinishReason, SamplingOptions
from serve.service import Service
from tests.serve.text_fakes import EOS, TINY, FakeBackend, ids, joined, options

PROMPT = [5, 6, 7]


@contextlib.contextmanager
def serving(backend=None, **rest):
    backend = backend or FakeBackend()
    chosen = {"default_accept": RuleOptions(name="rejection"), "default_drafts": 2, **rest}
    service = Service(backend, TINY, model="tiny", max_model_len=64, **chosen)
    service.start()
    try:
        yield service, backend
    finally:
        service.stop()
        assert backend.stopped


async def collect(service, opts, prompt=PROMPT, id="r") -> dict[int, list[Output]]:
    pieces: dict[int, list[Output]] = {}
    async for piece in service.generate(prompt, opts, request_id=id):
        pieces.setdefault(piece.index, []).append(piece)
    return pieces


async def first_piece(service, opts=None, prompt=PROMPT, id="r"):
    stream = service.generate(prompt, opts or options(), request_id=id)
    try:
        return await anext(stream)
    finally:
        await stream.aclose()


def test_n_answers_are_n_requests_with_seeds_counted_up():
    with serving() as (service, backend):

        async def run():
            sampling = SamplingOptions(seed=2**32 - 1)
            opts = options(n=3, sampling=sampling, priority=4, salt="s", thinking=True)
            task = asyncio.create_task(collect(service, opts))
            requests = await backend.wait_submitted(3)
            for step in range(2):
                backend.emit(*(TokenEvent(r, ids(f"{r.id} {step} ")) for r in requests))
            backend.emit(*(TokenEvent(r, [EOS], FinishReason.STOP, None, EOS) for r in requests))
            return await task

        pieces = asyncio.run(run())
        assert [r.id for r in backend.submitted] == ["r-0", "r-1", "r-2"]
        assert [r.sampling.seed for r in backend.submitted] == [2**32 - 1, 0, 1]
        for r in backend.submitted:
            assert (r.priority, r.salt, r.thinking, r.drafts) == (4, "s", True, None)
            assert r.tokens == PROMPT and r.accept == RuleOptions(name="rejection")
            assert r.arrival > 0
        for i in range(3):
            got = joined(pieces[i])
            assert got.text == f"r-{i} 0 r-{i} 1 "
            assert (got.finish, got.stop_reason) == (FinishReason.STOP, None)
        assert (backend.aborted, backend.finished) == ([], [])


@pytest.mark.parametrize(
    ("accept", "drafts", "lossless"),
    [(None, None, False), ("rejection", None, True), (None, 0, True), ("typical", 1, False)],
)
def test_usage(accept, drafts, lossless):
    typical = RuleOptions(name="typical")
    with serving(default_accept=typical, synthetic=True) as (service, backend):

        async def run():
            chosen = RuleOptions(name=accept) if accept else None
            opts = options(accept=chosen, drafts=drafts)
            task = asyncio.create_task(collect(service, opts))
            (request,) = await backend.wait_submitted(1)
            request.hit, request.drafted, request.accepted = 2, 8, 3
            backend.emit(TokenEvent(request, ids("a b"), FinishReason.LENGTH))
            return request, joined((await task)[0])

        request, got = asyncio.run(run())
        assert request.drafts == drafts
        usage = got.usage
        assert usage is not None and usage.lossless is lossless and usage.synthetic
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(ids("a b")))
        assert (usage.cached_tokens, usage.drafted, usage.accepted) == (2, 8, 3)


def test_a_stop_string_of_one_answer_leaves_the_others_running():
    with serving() as (service, backend):

        async def run():
            task = asyncio.create_task(collect(service, options(n=2, stop=("END",))))
            one, two = await backend.wait_submitted(2)
            backend.emit(TokenEvent(one, ids("a END")), TokenEvent(two, ids("b")))
            backend.emit(TokenEvent(one, ids("late")), TokenEvent(two, ids("c")))
            backend.emit(TokenEvent(two, [], FinishReason.LENGTH))
            return await task

        pieces = asyncio.run(run())
        assert (joined(pieces[0]).text, joined(pieces[1]).text) == ("a ", "bc")
        assert backend.finished == [("r-0", FinishReason.STOP)] and backend.aborted == []


def test_a_refused_answer_takes_the_earlier_ones_with_it():
    backend = FakeBackend()
    backend.refuse["r-1"] = OverloadedError("the queue is full", retry_after=3.0)
    metrics = Metrics("tiny")
    with serving(backend, metrics=metrics) as (service, _):
        with pytest.raises(OverloadedError, match="full"):
            asyncio.run(first_piece(service, options(n=3)))
        assert [r.id for r in backend.submitted] == ["r-0"]
        assert backend.aborted == ["r-0"]
        # The id is free again, and only what ran counts.
        backend.refuse["r-0"] = ValueError("too long")
        with pytest.raises(ValueError, match="too long"):
            asyncio.run(first_piece(service))
        labels = {"model_name": "tiny", "finished_reason": "abort"}
        assert metrics.registry.get_sample_value("dskjax:request_success_total", labels) == 1


def test_closing_the_iterator_aborts_what_still_runs():
    with serving() as (service, backend):

        async def run():
            stream = service.generate(PROMPT, options(n=2), request_id="r")
            task = asyncio.ensure_future(anext(stream))
            one, two = await backend.wait_submitted(2)
            backend.emit(TokenEvent(one, ids("a"), FinishReason.LENGTH))
            assert (await task).finish is FinishReason.LENGTH
            await stream.aclose()
            backend.emit(TokenEvent(two, ids("b")))  # what was under way is ignored

        asyncio.run(run())
        assert backend.aborted == ["r-1"]


def test_cancelling_the_reader_aborts():
    with serving() as (service, backend):

        async def run():
            task = asyncio.create_task(collect(service, options(n=2)))
            await backend.wait_submitted(2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await service.drained(0)

        asyncio.run(run())
        assert backend.aborted == ["r-0", "r-1"]


def test_an_engines_error_ends_the_answer():
    with serving() as (service, backend):

        async def run():
            task = asyncio.create_task(collect(service, options()))
            (request,) = await backend.wait_submitted(1)
            backend.emit(TokenEvent(request, [], FinishReason.ERROR, message="device lost"))
            return joined((await task)[0])

        got = asyncio.run(run())
        assert (got.finish, got.message) == (FinishReason.ERROR, "device lost")


def test_requests_that_cannot_be_served():
    with serving() as (service, backend):
        with pytest.raises(ValueError, match="64 tokens.*longest sequence, 64"):
            asyncio.run(first_piece(service, prompt=[5] * 64))
        with pytest.raises(ValueError, match="n=0"):
            asyncio.run(first_piece(service, options(n=0)))
        with pytest.raises(ValueError, match="empty"):
            asyncio.run(first_piece(service, prompt=[]))
        backend.ready = False
        assert not service.ready
        with pytest.raises(UnavailableError, match="not ready"):
            asyncio.run(first_piece(service))
        assert backend.submitted == []


def test_stop_ends_what_is_in_flight():
    backend = FakeBackend()

    async def run():
        with serving(backend) as (service, _):
            task = asyncio.create_task(collect(service, options()))
            (request,) = await backend.wait_submitted(1)
            backend.emit(TokenEvent(request, ids("a")))
        return joined((await task)[0])

    got = asyncio.run(run())
    assert (got.text, got.finish) == ("a", FinishReason.ABORT)


# ------------------------------------------------------------------ drain and probe


def test_drain_refuses_new_requests_and_waits_for_the_old():
    with serving() as (service, backend):

        async def run():
            assert await service.drained(0)
            task = asyncio.create_task(collect(service, options()))
            (request,) = await backend.wait_submitted(1)
            service.drain()
            assert service.draining and not service.ready
            with pytest.raises(UnavailableError, match="shutting down"):
                await first_piece(service, id="other")
            assert not await service.drained(0.01)
            drained = asyncio.create_task(service.drained(600))
            backend.emit(TokenEvent(request, ids("a"), FinishReason.LENGTH))
            assert joined((await task)[0]).text == "a"
            async with asyncio.timeout(10):
                assert await drained

        asyncio.run(run())


def test_probe_asks_every_engine_for_one_greedy_token():
    backend = FakeBackend(engines=("prefill", "decode"))
    with serving(backend) as (service, _):
        assert 0 <= asyncio.run(service.probe(10)) < 10
        assert [engine for engine, _ in backend.probed] == ["prefill", "decode"]
        for _, request in backend.probed:
            assert request.sampling.temperature == 0 and request.stop.max_tokens == 1
        assert len({request.id for _, request in backend.probed}) == 2
        service.drain()  # a server that drains is still alive
        assert asyncio.run(service.probe(10)) < 10


def test_probe_takes_ids_that_only_the_model_has():
    with serving() as (service, backend):
        backend.probes = False

        async def run():
            task = asyncio.create_task(service.probe(10))
            while not backend.probed:
                await asyncio.sleep(0.001)
            request = backend.probed[0][1]
            backend.emit(TokenEvent(request, [TINY.vocab_size + 9], FinishReason.LENGTH))
            return await task

        assert asyncio.run(run()) < 10


def test_probe_names_the_engines_that_gave_no_token():
    backend = FakeBackend(engines=("e0", "e1", "e2"))
    backend.refuse["e1"] = UnavailableError("the engine's thread has ended")
    with serving(backend) as (service, _):
        with pytest.raises(UnavailableError, match="no token: e1: the engine's thread has ended$"):
            asyncio.run(service.probe(10))
        backend.probes = False
        with pytest.raises(UnavailableError, match="e0: none within 0.05 s; e1: .*; e2: none"):
            asyncio.run(service.probe(0.05))
        assert sorted(id.split("-")[-1] for id in backend.aborted) == ["e0", "e2"]


def test_probe_tells_an_engines_error():
    with serving() as (service, backend):
        backend.probes = False

        async def run():
            task = asyncio.create_task(service.probe(10))
            while not backend.probed:
                await asyncio.sleep(0.001)
            request = backend.probed[0][1]
            backend.emit(TokenEvent(request, [], FinishReason.ERROR, message="device lost"))
            return await task

        with pytest.raises(UnavailableError, match="e0: device lost"):
            asyncio.run(run())


def test_it_is_a_text_service():
    with serving(created=123) as (service, _):
        typed: TextService = service
        assert (typed.model, typed.created, typed.max_model_len) == ("tiny", 123, 64)
        assert typed.ready and not typed.draining and not typed.synthetic
        members = {n for n in [*vars(TextService), *TextService.__annotations__] if n[0] != "_"}
        assert all(hasattr(service, name) for name in members) and "generate" in members
