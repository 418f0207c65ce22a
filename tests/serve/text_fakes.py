"""A backend without engines: it remembers what it was told, and the test says what it answers."""

import asyncio
import threading
from pathlib import Path

from dskjax.tokenizer import Tokenizer
from serve.api import GenerateOptions, Output
from serve.plan import TokenEvent
from serve.request import FinishReason, Request, SamplingOptions, StopOptions

FOLDER = Path(__file__).parents[2] / "examples" / "tiny-deepseek"
TINY = Tokenizer.load(FOLDER)
EOS = TINY.eos_ids[0]


def ids(text: str) -> list[int]:
    return TINY.encode(text)


def options(*, max_tokens=1000, stop=(), min_tokens=0, stop_token_ids=(), ignore_eos=False, **rest):
    rest.setdefault("sampling", SamplingOptions())
    return GenerateOptions(
        stop=StopOptions(
            max_tokens=max_tokens,
            stop=stop,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        ),
        **rest,
    )


def request(id="r", prompt=(5, 6, 7), **rest) -> Request:
    return Request(id, list(prompt), stop=StopOptions(max_tokens=1000), **rest)


def joined(pieces: list[Output]) -> Output:
    """The pieces of one answer as one piece."""
    last = pieces[-1]
    assert all(p.finish is None and p.usage is None for p in pieces[:-1])
    logprobs = [entry for p in pieces for entry in p.logprobs or ()]
    return Output(
        index=last.index,
        text="".join(p.text for p in pieces),
        reasoning="".join(p.reasoning for p in pieces),
        token_ids=[i for p in pieces for i in p.token_ids],
        logprobs=logprobs or None,
        finish=last.finish,
        stop_reason=last.stop_reason,
        message=last.message,
        usage=last.usage,
    )


class FakeBackend:
    """`refuse` maps a request id to what `submit` raises; a probe is answered if `probes` is on."""

    def __init__(self, *, engines=("e0",)):
        self.ready = True
        self.probes = True
        self.refuse: dict[str, Exception] = {}
        self.broken = False
        self.submitted: list[Request] = []
        self.probed: list[tuple[str, Request]] = []
        self.aborted: list[str] = []
        self.finished: list[tuple[str, FinishReason]] = []
        self.stopped = False
        self.called = threading.Condition()
        self._engines = list(engines)
        self._sink = None

    def start(self, sink):
        self._sink = sink

    def stop(self):
        self.stopped = True

    def submit(self, request):
        if request.id in self.refuse:
            raise self.refuse[request.id]
        self.submitted.append(request)

    def submit_to(self, engine, request):
        if engine in self.refuse:
            raise self.refuse[engine]
        self.probed.append((engine, request))
        if self.probes:
            self.emit(TokenEvent(request, [9], FinishReason.LENGTH))

    def abort(self, request_id):
        self.aborted.append(request_id)
        if self.broken:
            raise RuntimeError("this backend is broken")

    def finish(self, request_id, reason):
        self.finished.append((request_id, reason))
        if self.broken:
            raise RuntimeError("this backend is broken")

    def engines(self):
        return self._engines

    def emit(self, *events):
        assert self._sink is not None
        self._sink(list(events))

    async def wait_submitted(self, count: int) -> list[Request]:
        """The requests, once there are so many."""
        async with asyncio.timeout(10):
            while len(self.submitted) < count:
                await asyncio.sleep(0.001)
        return self.submitted
