"""A server that is asked to stop: signals to this very process, whose main thread `run` takes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import uvicorn
import uvloop

from serve.http import ServerConfig, create_app, run
from tests.serve.http.fake import until

ROOT = Path(__file__).parents[3]
BODY = {"model": "org/fake", "prompt": "hi", "seed": 0}
STREAM = {**BODY, "stream": True}


def serve(service, visit, drain_timeout=30.0):
    """Runs the server while another thread does `visit(url)`; the exit status and the seconds from
    the first signal to the end."""
    failures, sent = [], []
    gone = threading.Event()

    def kill(number):
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    def guarded(url):
        try:
            visit(url, kill)
        except BaseException as error:
            failures.append(error)
            if not sent:
                kill(signal.SIGTERM)
        finally:
            gone.set()

    def announce(host, port):
        assert host == "127.0.0.1"
        threading.Thread(target=guarded, args=(f"http://127.0.0.1:{port}",)).start()

    def own(number, frame):
        raise AssertionError("the server takes the signals")

    before = signal.signal(signal.SIGTERM, own)
    interrupt = signal.getsignal(signal.SIGINT)
    config = ServerConfig(log_level="critical")
    app = create_app(service)
    status = run(app, service, "127.0.0.1", 0, drain_timeout, announce=announce, config=config)
    end = time.monotonic()
    assert gone.wait(10)
    if failures:
        raise failures[0]
    assert signal.signal(signal.SIGTERM, before) is own
    assert signal.getsignal(signal.SIGINT) is interrupt
    return status, end - sent[-1]


def slow(service, length=100_000):
    service.length, service.delay, service.max_model_len = length, 0.02, 10**6


def ready(url):
    return httpx2.get(f"{url}/ready").status_code


@contextlib.contextmanager
def streaming(url):
    """The lines of a stream that has begun."""
    with httpx2.stream("POST", f"{url}/v1/completions", json=STREAM) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_under_way_end_and_new_ones_are_refused(service, number):
    slow(service, 60)

    def visit(url, kill):
        assert ready(url) == 200
        with streaming(url) as lines:
            kill(number)
            until(lambda: ready(url) == 503)
            refused = httpx2.post(f"{url}/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "stop"

    assert serve(service, visit)[0] == 0


def test_an_idle_server_stops_and_an_idle_connection_does_not_hold_it(service):
    def visit(url, kill):
        with httpx2.Client() as client:
            assert client.post(f"{url}/v1/completions", json=BODY).status_code == 200
            kill(signal.SIGTERM)
            until(lambda: service.draining)

    status, seconds = serve(service, visit)
    assert status == 0 and seconds < 5


def test_a_stream_that_does_not_end_in_time_ends_with_an_error(service):
    slow(service)

    def visit(url, kill):
        with streaming(url) as lines:
            kill(signal.SIGTERM)
            rest = [line for line in lines if line]
        error = json.loads(rest[-1][6:])["error"]
        assert error["code"] == "unavailable" and error["type"] == "service_unavailable_error"

    assert serve(service, visit, drain_timeout=0.3)[0] == 0


def test_an_answer_that_does_not_end_in_time_is_a_503(service):
    slow(service)

    def visit(url, kill):
        stop = threading.Thread(target=lambda: [until(lambda: service.open), kill(signal.SIGTERM)])
        stop.start()
        assert httpx2.post(f"{url}/v1/completions", json=BODY).status_code == 503
        stop.join()

    assert serve(service, visit, drain_timeout=0.3)[0] == 0


def test_a_second_signal_ends_at_once(service):
    slow(service)

    def visit(url, kill):
        with streaming(url) as lines:
            kill(signal.SIGTERM)
            until(lambda: ready(url) == 503)
            kill(signal.SIGINT)
            assert "[DONE]" not in "".join(lines)

    status, seconds = serve(service, visit, drain_timeout=600.0)
    assert status == 128 + signal.SIGINT and seconds < 3


@pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_second_signal_does_not_wait_for_an_upload(service, monkeypatch, loop):
    monkeypatch.setattr(uvicorn.Config, "get_loop_factory", lambda self: loop)

    def visit(url, kill):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as upload:
            upload.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            assert ready(url) == 200
            kill(signal.SIGTERM)
            until(lambda: service.draining)
            kill(signal.SIGTERM)
            with contextlib.suppress(ConnectionResetError):
                upload.recv(1000)

    status, seconds = serve(service, visit)
    assert status == 128 + signal.SIGTERM and seconds < 1.5


def test_an_address_that_is_taken_is_named(service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(create_app(service), service, "127.0.0.1", port, 1.0)
    with pytest.raises(OSError, match="cannot listen on no.such.host.invalid:1"):
        run(create_app(service), service, "no.such.host.invalid", 1, 1.0)


def test_a_process_of_its_own_ends_with_status_0():
    command = [sys.executable, "-m", "tests.serve.http.drain_server", "30", "60", "0.02"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            name, host, port = process.stdout.readline().split()
            assert name == "listening"
            with streaming(f"http://{host}:{port}") as lines:
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert process.wait(20) == 0 and process.stdout.read() == "open 0\n"
        finally:
            process.kill()
