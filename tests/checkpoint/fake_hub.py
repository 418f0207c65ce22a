"""A Hugging Face hub on this machine: the few endpoints that a download asks, with faults."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

_ROUTE = re.compile(
    r"/(?:api/models/(?P<of>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<at>[^/?]+)"
    r"|(?P<name>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<file>[^?]+))"
)


class FakeHub:
    """Repositories by name, each a mapping from revisions to folders.

    Attributes:
        repos: name -> {revision: folder}.
        gated: names that need an access token.
        break_at: file -> how many of its bytes the next answer sends before the connection breaks.
        status: answer every request with it.
        requests: "METHOD path [Range]" of all that were answered.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.break_at: dict[str, int] = {}
        self.status: int | None = None
        self.requests: list[str] = []

    def downloads(self) -> list[str]:
        """Files whose bytes were asked for, in any order, with the range if any."""
        asked = [r for r in self.requests if r.startswith("GET") and "/resolve/" in r]
        return sorted(r.split("/resolve/")[1].split("/", 1)[1] for r in asked)

    def answer(self, request: "_Handler") -> None:
        ranges = request.headers.get("Range", "")
        self.requests.append(f"{request.command} {request.path} {ranges}".strip())
        found = _ROUTE.match(request.path)
        if found is None:  # what the library asks of its own accord
            request.reply(404, {}, b"")
            return
        name = found["of"] or found["name"]
        if self.status is not None:
            request.reply(self.status, {}, b"")
        elif name not in self.repos:
            request.reply(401, {}, b"Invalid username or password.")
        elif name in self.gated and request.headers.get("Authorization") is None:
            request.reply(401, {"X-Error-Code": "GatedRepo"}, b"Access is restricted.")
        else:
            self._answer(request, found, self.repos[name], ranges)

    def _answer(
        self, request: "_Handler", found: Any, revisions: dict[str, Path], ranges: str
    ) -> None:
        by_commit = {commit(name): name for name in revisions}
        at = found["at"] or found["commit"]
        revision = by_commit.get(at, at)
        if revision not in revisions:
            request.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            return
        folder = revisions[revision]
        if found["what"] == "revision":
            request.reply_json({"id": found["of"], "sha": commit(revision), "siblings": []})
        elif found["what"] == "tree":
            request.reply_json(
                [
                    {
                        "type": "file",
                        "path": path.relative_to(folder).as_posix(),
                        "size": path.stat().st_size,
                        "oid": etag(path),
                    }
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                ]
            )
        else:
            self._send(request, folder / found["file"], revision, ranges)

    def _send(self, request: "_Handler", path: Path, revision: str, ranges: str) -> None:
        data, status = path.read_bytes(), 200
        start = int(ranges.removeprefix("bytes=").removesuffix("-") or 0)
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit(revision)}
        if ranges:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        data = data[start:]
        headers["Content-Length"] = str(len(data))
        if request.command == "GET" and path.name in self.break_at:
            data = data[: self.break_at.pop(path.name)]
        request.reply(status, headers, data)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self):  # noqa: N802
        self.hub.answer(self)

    do_HEAD = do_GET  # noqa: N815

    def reply_json(self, value: Any) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that `huggingface_hub` takes for the real one, and an empty cache."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
