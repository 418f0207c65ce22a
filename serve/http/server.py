"""The process that listens: start, announce, drain on a signal, end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from serve.api import TextService
from serve.http.config import ServerConfig
from serve.http.protocol import timed_protocol
from serve.http.stream import InFlight

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 2  # seconds for what is no answer: an upload, a last byte


def run(
    app: FastAPI,
    service: TextService,
    host: str,
    port: int,
    drain_timeout: float,
    *,
    announce: Callable[[str, int], None] | None = None,
    config: ServerConfig | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT, and returns the exit status.

    The first signal drains: the service refuses new requests, /ready answers 503, and the answers
    under way have `drain_timeout` seconds to end; what is left then gets an error. The second one
    ends at once.

    Args:
        app: of `create_app`.
        service: the same that the app serves.
        host: address or name to listen on.
        port: 0 picks a free one.
        drain_timeout: seconds.
        announce: called with host and real port once requests are answered.
        config: deadlines and logs.

    Returns:
        0 after a drain, 128 + the signal's number after a second signal.

    Raises:
        OSError: cannot listen there.
    """
    config = config or ServerConfig()
    with contextlib.closing(_listen(host, port)) as listener:
        settings = uvicorn.Config(
            app,
            http=timed_protocol(config.header_timeout, config.write_timeout),
            ws="none",
            lifespan="on",
            log_level=config.log_level,
            access_log=config.access_log,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=config.keep_alive,
            timeout_graceful_shutdown=_GRACE,
            h11_max_incomplete_event_size=config.max_header_bytes,
        )
        server = _Server(settings)
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
            return runner.run(_serve(server, listener, service, drain_timeout, announce))


def check_address(host: str, port: int) -> None:
    """Whether `run` could listen there now, for whoever has much to do before.

    Raises:
        OSError: it could not.
    """
    _listen(host, port).close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Signals are `_serve`'s: uvicorn's way would end the process with the signal."""
        yield


async def _serve(
    server: _Server,
    listener: socket.socket,
    service: TextService,
    drain_timeout: float,
    announce: Callable[[str, int], None] | None,
) -> int:
    in_flight: InFlight = server.config.app.state.in_flight  # type: ignore[union-attr]
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(_until_asked(server, signals, announce, listener))
    try:
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            return 1  # it could not start: its own log says why
        asked.result()
        service.drain()
        second = asyncio.create_task(signals.get())
        idle = asyncio.create_task(in_flight.idle())
        await asyncio.wait(
            (idle, second), timeout=drain_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        idle.cancel()
        in_flight.abort()
        server.should_exit = True
        await asyncio.wait((serving, second), return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = second.done()
        server.config.timeout_graceful_shutdown = 0 if second.done() else _GRACE
        await serving
        return 128 + second.result() if second.done() else 0
    finally:
        asked.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _until_asked(
    server: _Server,
    signals: asyncio.Queue[int],
    announce: Callable[[str, int], None] | None,
    listener: socket.socket,
) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    if announce is not None:
        announce(*listener.getsockname()[:2])
    await signals.get()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise OSError(f"cannot listen on {host}:{port}: ports are 0 to {2**16 - 1}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
