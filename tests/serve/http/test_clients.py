"""Clients that go away, stall, or talk nonsense, on real sockets."""

import contextlib
import json
import socket
import threading
import time

import pytest

from serve.http import HttpConfig, create_app
from tests.serve.http import fake
from tests.serve.http.fake import listening, until

BODY = {"model": "org/fake", "prompt": "hi"}


def http(path="/v1/completions", body=None, headers="", method="POST"):
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    return head.encode() + b"\r\n" + raw


@contextlib.contextmanager
def connected(port, data=b""):
    with socket.socket() as connection:
        connection.settimeout(5)
        # A small buffer: what nobody reads must not disappear in megabytes of it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(data)
        yield connection


def read_all(connection):
    """Until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_until(connection, words):
    data = b""
    while words not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


def slow(service, **knobs):
    service.length, service.delay = 200, 0.02
    for name, value in knobs.items():
        setattr(service, name, value)


@pytest.mark.parametrize("body", [BODY, {**BODY, "n": 3}, {**BODY, "prompt": ["a", "b", "c"]}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(service, stream, body):
    slow(service)
    with listening(create_app(service)) as port:
        with connected(port, http(body={**body, "stream": stream})) as connection:
            until(lambda: service.open == (3 if isinstance(body["prompt"], list) else 1))
            if stream:
                read_until(connection, b"data: ")
        left = time.monotonic()
        until(lambda: service.open == 0)
        assert time.monotonic() - left < 2  # of the 4 seconds that the answer takes


def test_a_client_that_leaves_before_the_first_token_ends_its_request(service):
    slow(service, delay=60)
    with listening(create_app(service)) as port:
        for stream in (False, True):
            with connected(port, http(body={**BODY, "stream": stream})):
                until(lambda: service.open == 1)
            until(lambda: service.open == 0)


def test_a_client_that_does_not_read_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(fake, "WORDS", ("x" * 50_000,))
    service.length, service.max_model_len = 200_000, 10**6
    with listening(create_app(service), write_timeout=0.3) as port:
        with connected(port, http(body={**BODY, "stream": True})):
            until(lambda: service.open == 1)
            until(lambda: service.open == 0)


def test_a_body_that_stops_coming_times_out(service):
    config = HttpConfig(body_timeout=0.2)
    with listening(create_app(service, config)) as port:
        whole = http(body=BODY)
        with connected(port, whole[:-5]) as connection:
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"timeout_error"' in answer
        with connected(port, whole[:-5]) as connection:  # dribbling does not extend the time
            start = time.monotonic()
            with contextlib.suppress(OSError):
                for byte in whole[-5:-1]:
                    time.sleep(0.15)
                    connection.sendall(bytes([byte]))
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - start < 3
        with connected(port, whole[:-5]):
            pass  # gone in the middle of its body
        with connected(port, http(path="/ready", method="GET")) as connection:
            assert b" 200 " in read_until(connection, b"ready")
    assert not service.calls


def test_headers_that_stop_coming_are_cut_off(service):
    with listening(create_app(service), header_timeout=0.2) as port:
        for start in (b"", b"GET", http(path="/ready", method="GET")[:-2]):
            with connected(port, start) as connection:
                with contextlib.suppress(ConnectionResetError):
                    assert read_all(connection) == b""
        with connected(port, http(path="/ready", method="GET")) as connection:
            read_until(connection, b"ready")
            connection.sendall(b"GET /rea")  # the second request on a kept connection
            with contextlib.suppress(ConnectionResetError):
                assert read_all(connection) == b""


def test_a_long_answer_outlives_the_header_timeout(service):
    slow(service, length=20, delay=0.03)
    with listening(create_app(service), header_timeout=0.2) as port:
        with connected(port, http(body={**BODY, "stream": True})) as connection:
            assert b"[DONE]" in read_until(connection, b"[DONE]")


def test_a_refused_upload_ends_though_it_goes_on(service):
    config = HttpConfig(max_body=1000, api_keys=("key",))
    with listening(create_app(service, config), header_timeout=0.3) as port:
        head = "Content-Type: application/json\r\nContent-Length: 10000000\r\n"
        for headers, status in ((head, b"401"), (f"{head}Authorization: Bearer key\r\n", b"413")):
            with connected(port, http(headers=headers)) as connection:
                assert b" " + status + b" " in read_until(connection, b"}}")
                connection.sendall(b"more")  # no longer idle, which another timer would end
                with contextlib.suppress(ConnectionResetError):
                    assert read_all(connection) == b""


def test_a_client_that_waits_for_leave_to_send_is_told_no(service):
    config = HttpConfig(max_body=10)
    with listening(create_app(service, config)) as port:
        head = "Expect: 100-continue\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        with connected(port, http(headers=head)) as connection:
            answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"100 Continue" not in answer


def test_too_many_headers_and_nonsense(service):
    with listening(create_app(service)) as port:
        many = "".join(f"X-{i}: {'v' * 100}\r\n" for i in range(2000))
        for data in (http(headers=many), b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n"):
            with connected(port) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    assert read_all(connection).startswith(b"HTTP/1.1 400 ")
    assert not service.calls


def test_many_requests_on_one_connection(service):
    with listening(create_app(service)) as port:
        with connected(port) as connection:
            for _ in range(3):
                connection.sendall(http(body={**BODY, "seed": 0}))
                assert b"red green" in read_until(connection, b'"dskjax"')


def test_a_storm_of_clients_that_leave(service):
    """Whatever moment they choose, nothing stays."""
    slow(service, delay=0.005, length=20)
    with listening(create_app(service)) as port:

        def visit(number):
            body = {**BODY, "stream": number % 2 == 0, "prompt": ["a"] * (1 + number % 3)}
            data = http(body=body)
            cut = len(data) - (number % 5 == 4)
            with connected(port, data[:cut]):
                time.sleep(0.004 * (number % 17))

        threads = [threading.Thread(target=visit, args=(i,)) for i in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: service.open == 0)
        assert service.most > 1
        with connected(port, http(body={**BODY, "seed": 0})) as connection:
            assert b"red green" in read_until(connection, b'"dskjax"')
