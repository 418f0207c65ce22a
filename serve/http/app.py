"""The routes: what a URL means, and nothing of how it is done."""

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve.api import TextService, UnavailableError
from serve.http import schema
from serve.http.body import parse_object
from serve.http.config import HttpConfig
from serve.http.errors import ApiError, internal, invalid, json_response, short, unavailable
from serve.http.format import ChatShape, CompletionShape
from serve.http.health import Health
from serve.http.limits import Gate
from serve.http.plan import Planner
from serve.http.stream import InFlight, Reply

_IN_LOOP = 16 << 10
"""Bytes of a body up to which tokenising it in the event loop disturbs nobody."""


def create_app(
    service: TextService,
    config: HttpConfig | None = None,
    *,
    registry: prometheus_client.CollectorRegistry | None = None,
) -> FastAPI:
    """The application that serves `service`.

    Its `state.in_flight` knows the answers under way, which `serve.http.server.run` waits for.

    Args:
        service: what answers.
        config: limits and keys.
        registry: what /metrics shows; None: prometheus_client's own.
    """
    config = config or HttpConfig()
    routes = _Routes(service, config, registry or prometheus_client.REGISTRY)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await routes.health_check.close()

    app = FastAPI(
        title="dskjax",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.in_flight = routes.in_flight
    for method, path, endpoint in routes.table():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_middleware(Gate, config=config)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    return app


class _Routes:
    def __init__(
        self,
        service: TextService,
        config: HttpConfig,
        registry: prometheus_client.CollectorRegistry,
    ):
        self.in_flight = InFlight()
        self.health_check = Health(service, config.probe_timeout, config.probe_ttl)
        self._service = service
        self._planner = Planner(service, config)
        self._registry = registry

    def table(self) -> Sequence[tuple[str, str, Callable[..., Any]]]:
        return [
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/health", self.health),
            ("GET", "/ready", self.ready),
            ("GET", "/metrics", self.metrics),
            ("GET", "/version", self.version),
        ]

    async def completions(self, request: Request) -> Response:
        body, size = await _body(request, schema.CompletionBody)
        self._planner.check_model(body.model)
        job = await _off_loop(size, lambda: self._planner.completion(body))
        id_ = request.state.request_id
        shape = CompletionShape(id_, self._service.model, job, self._service.synthetic)
        return Reply(self._service, job, shape, id_, self.in_flight)

    async def chat_completions(self, request: Request) -> Response:
        body, size = await _body(request, schema.ChatBody)
        self._planner.check_model(body.model)
        job = await _off_loop(size, lambda: self._planner.chat(body))
        id_ = request.state.request_id
        shape = ChatShape(id_, self._service.model, job, self._service.synthetic)
        return Reply(self._service, job, shape, id_, self.in_flight)

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._planner.check_model(name)
        return json_response(self._model())

    async def tokenize(self, request: Request) -> Response:
        body, size = await _body(request, schema.TokenizeBody)
        self._planner.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give exactly one of prompt and messages", "prompt")
        ids = await _off_loop(size, lambda: self._tokens(body))
        limit = self._service.max_model_len
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body, size = await _body(request, schema.DetokenizeBody)
        self._planner.check_model(body.model)
        self._planner.check_ids(body.tokens, "tokens")
        try:
            text = await _off_loop(
                size,
                lambda: self._service.tokenizer.decode(
                    body.tokens, skip_special=body.skip_special_tokens
                ),
            )
        except ValueError as error:  # an id that no token has
            raise invalid(str(error), "tokens") from None
        return json_response({"prompt": text})

    async def health(self) -> Response:
        try:
            seconds = await self.health_check.check()
        except UnavailableError as error:
            raise unavailable(str(error)) from None
        return json_response({"status": "ok", "seconds": round(seconds, 6)})

    async def ready(self) -> Response:
        if self._service.ready and not self._service.draining:
            return json_response({"status": "ready"})
        raise unavailable("draining" if self._service.draining else "starting")

    async def metrics(self, request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": kind})

    async def version(self) -> Response:
        return json_response({"version": importlib.metadata.version("dskjax")})

    def _tokens(self, body: schema.TokenizeBody) -> list[int]:
        if body.messages is not None:
            return self._planner.conversation(body.messages, body.chat_template_kwargs.thinking)
        assert body.prompt is not None
        return self._planner.encoder.text([body.prompt], bos=body.add_special_tokens)[0]

    def _model(self) -> Mapping[str, Any]:
        return {
            "id": self._service.model,
            "object": "model",
            "created": self._service.created,
            "owned_by": "dskjax",
            "max_model_len": self._service.max_model_len,
        }


async def _body[B: schema.Body](request: Request, kind: type[B]) -> tuple[B, int]:
    """A route's body, and how many bytes it had."""
    given = request.headers.getlist("content-type")
    media = [value.partition(";")[0].strip().lower() for value in given]
    if media != ["application/json"]:
        wrong = short(given[0]) if given else "none"
        raise ApiError(415, f"the content type must be application/json, not {wrong}")
    raw = await request.body()
    if len(raw) <= _IN_LOOP:
        return schema.read(kind, parse_object(raw)), len(raw)
    return await run_in_threadpool(lambda: schema.read(kind, parse_object(raw))), len(raw)


async def _off_loop[T](size: int, make: Callable[[], T]) -> T:
    """In the event loop if it is quick, in a thread if not."""
    return make() if size <= _IN_LOOP else await run_in_threadpool(make)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """A path or method that no route has."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {short(request.url.path)}"
    message = {404: f"no such route: {what}", 405: f"wrong method: {what}"}
    text = message.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, text, code=code, headers=error.headers).response()


async def _on_fault(request: Request, _: Exception) -> Response:
    """The traceback goes to the log; the client learns the id to ask with."""
    id_ = getattr(request.state, "shown_id", "")
    response = internal(f"internal error; the server's log says more (request {id_})").response()
    response.headers["x-request-id"] = id_
    return response
