"""From a job to bytes: runs a service's iterators, watches the client, and writes JSON or SSE.

Whatever ends an answer (its last piece, an error, a client that went away, a drain whose time is
up), the iterators are closed before the reply returns, so nothing goes on generating for nobody.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api import GenerateOptions, Output, OverloadedError, TextService, UnavailableError
from serve.http.errors import ApiError, dumps, from_service, internal, json_response, unavailable
from serve.http.format import Shape
from serve.http.plan import Job
from serve.request import FinishReason

_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"


class InFlight:
    """The replies under way, for a server that drains.

    Attributes:
        aborted: a drain ran out of time: what is under way ends with an error, and so does what
            still comes.
    """

    def __init__(self):
        self.aborted = False
        self._work: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._work)

    @contextlib.contextmanager
    def track(self, work: asyncio.Task[None]) -> Iterator[None]:
        """Counts a reply while the block runs."""
        self._work.add(work)
        self._idle.clear()
        if self.aborted:
            work.cancel()
        try:
            yield
        finally:
            self._work.discard(work)
            if not self._work:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no reply is under way."""
        await self._idle.wait()

    def abort(self) -> None:
        """Ends every reply with an error."""
        self.aborted = True
        for work in self._work:
            work.cancel()


class Reply(Response):
    """The answer to a job, made while it is sent; it is whole or a stream as the job says."""

    def __init__(self, service: TextService, job: Job, shape: Shape, id_: str, in_flight: InFlight):
        super().__init__()
        self._job = job
        self._shape = shape
        self._in_flight = in_flight
        self._service = service
        self._id = id_
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; returns when the last byte is handed over or nobody is left to take it."""
        run = self._stream(send) if self._job.stream else self._whole(scope, receive, send)
        work = asyncio.create_task(run)
        gone = asyncio.create_task(_disconnected(receive))
        with self._in_flight.track(work):
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                work.cancel()
                gone.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()  # raises what it raised
        elif self._in_flight.aborted:
            await self._fail(unavailable("the server stops"), scope, receive, send)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._outputs()) as outputs:
                async for index, output in outputs:
                    self._shape.answers[index].add(output)
            response = json_response(self._shape.whole())
        except ApiError as error:
            response = error.response()
        self._started = True
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._outputs()) as outputs:
                async for index, output in outputs:
                    chunk = self._shape.chunk(index, output)
                    if chunk is not None:
                        await self._event(chunk, send)
            if self._job.include_usage:
                await self._event(self._shape.usage_chunk(), send)
        except ApiError as error:
            await self._fail(error, {}, _nothing, send)
        except Exception:
            if not self._started:
                raise
            _log.exception("an answer failed after its first piece")
            await self._fail(internal(), {}, _nothing, send)
        else:
            await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    def _outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        return merged(self._service, self._job.prompts, self._id)

    async def _event(self, value: Any, send: Send) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            headers.append((b"cache-control", b"no-cache"))
            headers.append((b"x-accel-buffering", b"no"))  # or nginx collects events
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"data: " + dumps(value) + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """With a status while there is time for one, as the stream's last event afterwards."""
        if not self._started:
            await error.response()({"type": "http", **scope}, receive, send)
        elif self._job.stream:
            await self._event(error.body(), send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def merged(
    service: TextService, prompts: Sequence[tuple[list[int], GenerateOptions]], id_: str
) -> AsyncGenerator[tuple[int, Output], None]:
    """Pieces of all prompts as they come, with the number of their choice.

    Raises:
        ApiError: an answer failed; the others are closed.
    """
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for place, (ids, options) in enumerate(prompts):
            name = id_ if len(prompts) == 1 else f"{id_}-{place}"
            stream = _pieces(service, ids, options, name)
            streams.append(await stack.enter_async_context(contextlib.aclosing(stream)))
        n = prompts[0][1].n
        if len(streams) == 1:
            async for output in streams[0]:
                yield output.index, output
            return
        waits = {asyncio.create_task(_next(s)): place for place, s in enumerate(streams)}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in done:
                    place = waits.pop(wait)
                    output = wait.result()
                    if output is not None:
                        waits[asyncio.create_task(_next(streams[place]))] = place
                        yield place * n + output.index, output
        finally:  # an iterator can be closed only while nobody waits for it
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def _pieces(
    service: TextService, ids: list[int], options: GenerateOptions, id_: str
) -> AsyncGenerator[Output, None]:
    """A service's pieces; its errors and failed answers become ApiErrors."""
    open_ = set(range(options.n))
    begun = False
    try:
        async with _closed(service.generate(ids, options, request_id=id_)) as outputs:
            async for output in outputs:
                begun = True
                if output.finish is FinishReason.ERROR:
                    raise internal(output.message or "the engine failed")
                if output.finish is FinishReason.ABORT:
                    raise unavailable(output.message or "the request was aborted")
                if output.finish is not None:
                    open_.discard(output.index)
                yield output
    except (OverloadedError, UnavailableError) as error:
        raise from_service(error) from error
    except ValueError as error:
        if begun:
            raise
        raise from_service(error) from error
    if open_:
        raise RuntimeError(f"{id_}: the service ended without the end of answers {sorted(open_)}")


@contextlib.asynccontextmanager
async def _closed(outputs: AsyncIterator[Output]) -> AsyncIterator[AsyncIterator[Output]]:
    try:
        yield outputs
    finally:
        close = getattr(outputs, "aclose", None)
        if close is not None:
            await close()


async def _next(stream: AsyncGenerator[Output, None]) -> Output | None:
    return await anext(stream, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _nothing() -> Any:
    return {"type": "http.disconnect"}
