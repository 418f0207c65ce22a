"""The text service over a backend: n answers as n requests, their pieces as one stream."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from dskjax.decode.rules import RuleOptions
from dskjax.tokenizer import Tokenizer
from serve.api import GenerateOptions, Output
from serve.backend import Backend
from serve.errors import UnavailableError
from serve.metrics import Metrics
from serve.output import OutputThread
from serve.plan import TokenEvent
from serve.request import FinishReason, Request, SamplingOptions, StopOptions
from serve.text import AnswerText

PROBE_PRIORITY = -(2**31)
"""A probe asks whether an engine works, not how long its queue is."""


class Service:
    """Implements `serve.api.TextService`.

    Args:
        backend: the engines.
        tokenizer: of the model.
        model: name under which it is served.
        max_model_len: most tokens of prompt and answer together.
        default_accept, default_drafts: for requests that do not choose.
        synthetic: acceptance is simulated.
        metrics: takes the times of answers, if given.
        created: Unix time of the start; None is now.
        clock: seconds, the one that the engines read.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        model: str,
        max_model_len: int,
        default_accept: RuleOptions,
        default_drafts: int,
        synthetic: bool = False,
        metrics: Metrics | None = None,
        created: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model = model
        self.created = int(time.time()) if created is None else created
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self.default_accept = default_accept
        self.default_drafts = default_drafts
        self.synthetic = synthetic
        self._backend = backend
        self._clock = clock
        self._output = OutputThread(backend, metrics=metrics, clock=clock)
        self._started = False
        self._draining = False
        self._streams = 0
        self._waiting_for_end: list[asyncio.Future[None]] = []
        self._probes = itertools.count()

    def start(self) -> None:
        """Starts the output thread and the engines."""
        self._output.start()
        self._backend.start(self._output.push)
        self._started = True

    def stop(self) -> None:
        """Refuses new requests, ends the engines, and ends the answers that are left as aborted."""
        self._draining = True
        if self._started:
            self._backend.stop()
        self._output.stop()

    @property
    def ready(self) -> bool:
        """Warmed up and not draining."""
        return self._started and not self._draining and self._backend.ready

    @property
    def draining(self) -> bool:
        """No new requests; those in flight go on to their end."""
        return self._draining

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._draining = True

    async def drained(self, timeout: float) -> bool:
        """Waits until no stream is in flight; False if some still are after `timeout` seconds.

        To be awaited on the event loop that the streams run on.
        """
        if self._streams:
            end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting_for_end.append(end)
            await asyncio.wait([end], timeout=timeout)
        return not self._streams

    async def generate(
        self, prompt: Sequence[int], options: GenerateOptions, *, request_id: str
    ) -> AsyncGenerator[Output]:
        """Starts n answers and yields their pieces as they come; closing the iterator aborts them.

        Raises (before the first piece):
            ValueError: the request cannot be served as it is.
            OverloadedError: the queue is full.
            UnavailableError: not ready, or draining.
        """
        self._check(prompt, options)
        pieces: asyncio.Queue[Output] = asyncio.Queue()
        running: dict[int, str] = {}  # answer -> request id
        self._streams += 1
        try:
            for i in range(options.n):
                running[i] = self._submit(prompt, options, i, f"{request_id}-{i}", pieces)
            while running:
                piece = await pieces.get()
                if piece.finish is not None:
                    del running[piece.index]
                yield piece
        finally:
            self._streams -= 1
            if not self._streams:
                self._wake()
            for started in running.values():
                self._output.remove(started)
                self._backend.abort(started)

    async def probe(self, timeout: float) -> float:
        """Generates one token through every engine; returns the seconds it took.

        Raises:
            UnavailableError: no token within `timeout` seconds, or no engine is started.
        """
        engines = self._backend.engines()
        if not self._started or not engines:
            raise UnavailableError("no engine is started")
        begin = self._clock()
        results = await asyncio.gather(*(self._probe(engine, timeout) for engine in engines))
        if failed := [f"{e}: {why}" for e, why in zip(engines, results, strict=True) if why]:
            raise UnavailableError("engines gave no token: " + "; ".join(failed))
        return self._clock() - begin

    def _check(self, prompt: Sequence[int], options: GenerateOptions) -> None:
        if self._draining:
            raise UnavailableError("the server is shutting down and takes no new requests")
        if not self.ready:
            raise UnavailableError("the server is starting: its engines are not ready")
        if options.n < 1:
            raise ValueError(f"n={options.n} must be at least 1")
        least = min(options.stop.max_tokens, 1)
        if len(prompt) + least > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens: with {least} new ones at least it must fit "
                f"into the longest sequence, {self.max_model_len}"
            )

    def _submit(
        self,
        prompt: Sequence[int],
        options: GenerateOptions,
        index: int,
        id: str,
        pieces: asyncio.Queue[Output],
    ) -> str:
        rule = options.accept or self.default_accept
        drafts = self.default_drafts if options.drafts is None else options.drafts
        request = Request(
            id,
            prompt,
            stop=options.stop,
            sampling=_reseeded(options.sampling, index),
            accept=rule,
            drafts=options.drafts,
            priority=options.priority,
            arrival=self._clock(),
            salt=options.salt,
            thinking=options.thinking,
        )
        answer = AnswerText(
            self.tokenizer,
            options,
            request,
            index=index,
            lossless=rule.lossless or drafts == 0,  # without drafts the rule never rules
            synthetic=self.synthetic,
        )
        self._output.add(request, answer, pieces.put_nowait, loop=asyncio.get_running_loop())
        try:
            self._backend.submit(request)
        except BaseException:
            self._output.remove(id, counted=False)
            raise
        return id

    async def _probe(self, engine: str, timeout: float) -> str:
        """What is wrong with an engine; nothing if it gave a token."""
        loop = asyncio.get_running_loop()
        token: asyncio.Future[str] = loop.create_future()

        def take(piece: Output) -> None:
            if not token.done() and (piece.token_ids or piece.finish is not None):
                ended = piece.message or f"ended without a token ({piece.finish})"
                token.set_result("" if piece.token_ids else ended)

        tokenizer = self.tokenizer
        request = Request(
            f"probe-{next(self._probes)}-{engine}",
            [tokenizer.eos_ids[0] if tokenizer.bos_id is None else tokenizer.bos_id],
            stop=StopOptions(max_tokens=1, ignore_eos=True),
            sampling=SamplingOptions(temperature=0.0),
            accept=self.default_accept,
            drafts=0,
            priority=PROBE_PRIORITY,
            arrival=self._clock(),
        )
        try:
            self._output.add(request, _Probe(), take, loop=loop, measured=False)
            self._backend.submit_to(engine, request)
            async with asyncio.timeout(timeout):
                return await token
        except TimeoutError:
            return f"none within {timeout} s"
        except (RuntimeError, ValueError) as error:
            self._output.remove(request.id)  # refused: there is nothing to abort
            return str(error)
        finally:
            if self._output.remove(request.id):
                self._backend.abort(request.id)

    def _wake(self) -> None:
        waiting, self._waiting_for_end = self._waiting_for_end, []
        for end in waiting:
            if not end.done():
                end.set_result(None)


class _Probe:
    """An answer whose text does not matter: ids that only the model has are tokens too."""

    def push(self, event: TokenEvent) -> Output | None:
        return Output(token_ids=event.tokens, finish=event.finish, message=event.message)

    def end(self, reason: FinishReason, message: str) -> Output:
        return Output(finish=reason, message=message)


def _reseeded(sampling: SamplingOptions, index: int) -> SamplingOptions:
    """The options with the seed counted up."""
    seed = (sampling.seed + index) % 2**32
    return dataclasses.replace(sampling, seed=seed) if index else sampling
