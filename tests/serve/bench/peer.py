"""A server of another project's: scripted events, one route each, no extras."""

import json

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
METRICS = """\
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0"} 3.0
vllm:spec_decode_num_drafts_total{engine="1"} 2.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} 10.0
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 1.5
"""


def chat(delta, finish=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


ANSWER = [
    chat({"role": "assistant", "content": ""}),
    chat({"reasoning_content": "hm"}),
    chat({"content": " so"}),
    chat({"content": ""}, "stop"),
    USAGE,
    "[DONE]",
]


def peer(events=tuple(ANSWER), models=("a", "b"), metrics=METRICS):
    """The application; events are JSON values or raw data."""

    async def answer(_) -> Response:
        parts = [e if isinstance(e, str) else json.dumps(e) for e in events]
        lines = [f"data: {part}\n\n" for part in parts]
        return StreamingResponse(iter(lines), media_type="text/event-stream")

    async def listed(_) -> Response:
        return JSONResponse({"data": [{"id": name} for name in models]})

    async def counted(_) -> Response:
        return PlainTextResponse(metrics)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", answer, methods=["POST"]),
            Route("/v1/models", listed),
            Route("/metrics", counted),
        ]
    )
