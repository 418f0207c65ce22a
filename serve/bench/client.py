"""One request over HTTP, streamed: `Client.send` never raises for what a server does."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from serve.bench.answer import Answer
from serve.bench.workload import Job


class _Failure(Exception):
    """An answer that came to no end: its kind and what was said."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Client:
    """Sends requests to one model.

    Args:
        http: with the server's base URL and no limit on connections; see `connect`.
        model: name under which it is served.
        options: fields of every request, such as temperature; a job's own fields come last.
    """

    def __init__(
        self, http: httpx2.AsyncClient, model: str, options: Mapping[str, Any] | None = None
    ):
        self.http = http
        self.model = model
        self._options = dict(options or {})

    async def send(self, job: Job, *, due: float | None = None) -> Answer:
        """Sends a request and takes its answer in to the end.

        Args:
            job: with `prompt` or `messages`, which decides on the route.
            due: when it should have been sent, on the event loop's clock; None: now.
        """
        loop = asyncio.get_running_loop()
        sent = loop.time()
        answer = _Answer(sent if due is None else due, sent)
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
            **job,
        }
        path = "/v1/chat/completions" if "messages" in job else "/v1/completions"
        try:
            async with self.http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _Failure(f"HTTP {response.status_code}", _said(response))
                async for event in httpx2.EventSource(response):
                    if event.data == "[DONE]":
                        return answer.done()
                    answer.take(loop.time(), event.data)
            raise _Failure("broken", "the stream ended before the answer did")
        except _Failure as failure:
            return answer.failed(failure.kind, str(failure))
        except httpx2.TimeoutException as error:
            return answer.failed("timeout", str(error) or type(error).__name__)
        except httpx2.ConnectError as error:
            return answer.failed("refused", str(error) or type(error).__name__)
        except httpx2.HTTPError as error:
            return answer.failed("broken", str(error) or type(error).__name__)


class _Answer:
    """Collects what an answer's events say."""

    def __init__(self, due: float, sent: float):
        self._due, self._sent = due, sent
        self._pieces: list[float] = []
        self._texts: list[str] = []
        self._finish: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._extras: Mapping[str, Any] = {}

    def take(self, now: float, data: str) -> None:
        try:
            value = json.loads(data)
            if "error" in value:
                error = value["error"]
                raise _Failure("error event", str(error.get("message", error)))
            self._usage = value.get("usage") or self._usage
            self._extras = {**self._extras, **(value.get("dskjax") or {})}
            if not value["choices"]:
                return
            choice = value["choices"][0]
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
            text = reasoning + (delta.get("content") or choice.get("text") or "")
            finish = choice.get("finish_reason")
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
            raise _Failure("malformed", f"{error!r} in {data[:200]}") from error
        if text or finish:
            self._pieces.append(now)
            self._texts.append(text)
            self._finish = finish or self._finish

    def done(self) -> Answer:
        if self._finish is None:
            raise _Failure("malformed", "the answer has no finish_reason")
        if self._usage is None:
            raise _Failure("malformed", "the answer has no usage, so its tokens are not known")
        return self._answer()

    def failed(self, kind: str, message: str) -> Answer:
        return self._answer(kind, message[:300])

    def _answer(self, error: str | None = None, message: str = "") -> Answer:
        usage, extras = self._usage or {}, self._extras
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            due=self._due,
            sent=self._sent,
            pieces=tuple(self._pieces),
            text="".join(self._texts),
            finish=self._finish,
            prompt_tokens=usage.get("prompt_tokens") or 0,
            cached_tokens=details.get("cached_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            drafted=extras.get("drafted"),
            accepted=extras.get("accepted"),
            lossless=extras.get("lossless"),
            synthetic=bool(extras.get("synthetic_acceptance")),
            error=error,
            message=message,
        )


@contextlib.asynccontextmanager
async def connect(
    url: str, *, api_key: str | None = None, timeout: float = 600.0
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client for a server's address, with or without a trailing /v1.

    Args:
        url: of the server.
        api_key: sent as a bearer token.
        timeout: seconds to wait for the next piece of an answer.

    Raises:
        ValueError: no address.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        http = httpx2.AsyncClient(
            base_url=base,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
    except (httpx2.InvalidURL, ValueError) as error:
        raise ValueError(f"{url!r} is no address of a server: {error}") from error
    async with http:
        yield http


def _said(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200]
