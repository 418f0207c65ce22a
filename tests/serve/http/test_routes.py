"""The routes that generate nothing, health, and the gate before all of them."""

import asyncio

import httpx2
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serve.api import UnavailableError
from serve.http import HttpConfig, ServerConfig, create_app
from serve.http.health import Health
from tests.serve.http.fake import TINY

BODY = {"model": "org/fake", "prompt": "hi"}
USER = {"role": "user", "content": "hi <think>"}


def test_models(client):
    model = {"id": "org/fake", "object": "model", "created": 1_700_000_000, "owned_by": "dskjax"}
    model["max_model_len"] = 256
    assert client.get("/v1/models").json() == {"object": "list", "data": [model]}
    assert client.get("/v1/models/org/fake").json() == model
    missing = client.get("/v1/models/org/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_version(client):
    assert client.get("/version").json() == {"version": "0.1.0"}


def test_tokenize(client):
    answer = client.post("/tokenize", json={"prompt": "a <think>"}).json()
    tokens = TINY.encode("a <think>", bos=True, parse_special=False)
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 256}
    bare = client.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()
    assert bare["tokens"] == []
    body = {"messages": [USER], "chat_template_kwargs": {"thinking": True}, "model": "org/fake"}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    assert tokens.count(6142) == 1 and tokens[-1] == 6142
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"].count("hi <think>")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, "x"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [6144]}, "tokens"),
        ("/detokenize", {"tokens": ["5"]}, "tokens.0"),
    ],
)
def test_bad_tokenize(client, path, body, param):
    answer = client.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert client.post(path, json={**body, "model": "x"}).status_code in (400, 404)


def test_a_large_body_is_tokenised_off_the_loop(client, service):
    text = "word " * 20_000
    answer = client.post("/tokenize", json={"prompt": text}).json()
    assert answer["count"] == len(TINY.encode(text)) + 1
    refused = client.post("/v1/completions", json={**BODY, "prompt": text})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert str(answer["count"]) in refused.json()["error"]["message"]


def test_metrics_are_a_prometheus_text(service):
    registry = CollectorRegistry()
    Gauge("dskjax_running", "Requests.", registry=registry).set(3)
    Counter("dskjax_tokens", "Tokens.", ["kind"], registry=registry).labels('a"b\n').inc(2)
    with TestClient(create_app(service, registry=registry)) as client:
        plain = client.get("/metrics")
        opened = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    found = {f.name: f.samples for f in text_string_to_metric_families(plain.text)}
    assert found["dskjax_running"][0].value == 3
    assert found["dskjax_tokens"][0].labels == {"kind": 'a"b\n'}
    assert plain.headers["content-type"].startswith("text/plain")
    assert opened.text.endswith("# EOF\n")


def test_ready_follows_the_service(client, service):
    assert client.get("/ready").status_code == 200
    service.started = False
    starting = client.get("/ready")
    assert starting.status_code == 503 and starting.json()["error"]["message"] == "starting"
    service.started, service.draining = True, True
    assert client.get("/ready").json()["error"]["message"] == "draining"


# ------------------------------------------------------------------ health


def test_health_generates_a_token_at_most_once_a_second(client, service):
    for _ in range(5):
        answer = client.get("/health")
        assert answer.status_code == 200 and answer.json() == {"status": "ok", "seconds": 0.125}
    assert service.probes == 1


def test_health_without_a_cache_probes_again(service):
    with TestClient(create_app(service, HttpConfig(probe_ttl=0.0))) as client:
        assert client.get("/health").status_code == 200
        service.probe_error = UnavailableError("engine 0 is dead")
        answer = client.get("/health")
        assert answer.status_code == 503 and "engine 0" in answer.json()["error"]["message"]
    assert service.probes == 2


def test_health_gives_up_after_the_timeout(service):
    service.probe_delay = 60
    with TestClient(create_app(service, HttpConfig(probe_timeout=0.05))) as client:
        answer = client.get("/health")
    assert answer.status_code == 503 and "0.05 seconds" in answer.json()["error"]["message"]


def test_askers_share_a_probe_and_one_that_leaves_does_not_end_it(service):
    service.probe_delay = 0.05

    async def ask():
        health = Health(service, 5.0, 1.0)
        leaves, *stay = [asyncio.create_task(health.check()) for _ in range(4)]
        await asyncio.sleep(0.01)
        leaves.cancel()
        assert await asyncio.gather(*stay) == [0.125] * 3
        service.probe_delay = 60
        late = Health(service, 100.0, 1.0)
        waits = asyncio.create_task(late.check())
        await asyncio.sleep(0.01)
        await late.close()
        with pytest.raises(asyncio.CancelledError):
            await waits

    asyncio.run(ask())
    assert service.probes == 2


# ------------------------------------------------------------------ keys

KEYS = HttpConfig(api_keys=("first", "zweiter-schlüssel"))


@pytest.fixture
def locked(service):
    with TestClient(create_app(service, KEYS)) as client:
        yield client


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"first",
        b"Basic first",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer firs",
        b"Bearer first2",
        b"Bearer \xff\xfe",
    ],
)
def test_wrong_keys(locked, service, header):
    headers = {} if header is None else {"authorization": header}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/nowhere")):
        answer = locked.request(method, path, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert error["code"] == "invalid_api_key" and "first" not in error["message"]
    assert locked.get("/metrics", headers=headers).status_code == 401
    assert not service.calls


def test_right_keys(locked):
    for key in ("first", "zweiter-schlüssel"):
        headers = {"authorization": b"bearer " + key.encode()}
        assert locked.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    twice = [("authorization", "Bearer first"), ("authorization", "Bearer first")]
    assert locked.get("/v1/models", headers=httpx2.Headers(twice)).status_code == 401


def test_probes_need_no_key(locked, service):
    assert locked.get("/health").status_code == locked.get("/ready").status_code == 200
    config = HttpConfig(api_keys=("first",), public_metrics=True)
    with TestClient(create_app(service, config)) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/metrics/").status_code == 401


def test_a_key_is_wanted_before_anything_of_a_body_is_read(service):
    read = []

    async def ask():
        async def receive():
            read.append(1)
            return {"type": "http.request", "body": b"{}", "more_body": False}

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        scope.update({"query_string": b"", "http_version": "1.1", "scheme": "http"})
        await create_app(service, KEYS)(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(ask()) == 401 and not read


# ------------------------------------------------------------------ ids, sizes, other origins


def test_request_ids(client, service):
    answer = client.post("/v1/completions", json=BODY, headers={"x-request-id": "my-id_1"})
    assert answer.headers["x-request-id"] == "my-id_1"
    again = client.post("/v1/completions", json=BODY, headers={"x-request-id": "my-id_1"})
    assert again.json()["id"] != answer.json()["id"]  # an engine never sees an id twice
    own = client.post("/v1/completions", json=BODY)
    assert own.headers["x-request-id"] == own.json()["id"]
    assert client.get("/nowhere").headers["x-request-id"].startswith("req-")
    assert client.get("/ready", headers={"x-request-id": "a" * 128}).status_code == 200


def test_one_request_id_at_most(client):
    twice = httpx2.Headers([("x-request-id", "a"), ("x-request-id", "b")])
    assert client.get("/ready", headers=twice).status_code == 400


@pytest.mark.parametrize("id_", [b"", b"a" * 129, b"a b", b"\x7f", "ü".encode()])
def test_bad_request_ids(client, service, id_):
    answer = client.post("/v1/completions", json=BODY, headers={"x-request-id": id_})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-Id"
    assert answer.headers["x-request-id"].startswith("cmpl-") and not service.calls


def test_bodies_have_a_limit(service):
    with TestClient(create_app(service, HttpConfig(max_body=100))) as client:
        fits = b'{"prompt": "%s"}' % (b"a" * 86)
        headers = {"content-type": "application/json"}
        assert len(fits) == 100
        assert client.post("/tokenize", content=fits, headers=headers).status_code == 200
        for body in (fits + b" ", iter([b"a" * 60] * 2)):  # announced, and chunked
            answer = client.post("/tokenize", content=body, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"


def test_other_origins_get_no_leave(client):
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    for answer in (
        client.options("/v1/completions", headers=headers),
        client.post("/v1/completions", json=BODY, headers=headers),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"api_keys": ("",)}, "API key"),
        ({"api_keys": (" a",)}, "API key"),
        ({"api_keys": ("a\n",)}, "API key"),
        ({"max_body": 0}, "max_body=0"),
        ({"max_n": 0}, "max_n=0"),
        ({"max_stop": 17}, "max_stop=17"),
        ({"default_max_tokens": 0}, "default_max_tokens=0"),
        ({"body_timeout": 0.0}, "body_timeout=0.0"),
        ({"probe_ttl": -1.0}, "probe_ttl=-1.0"),
    ],
)
def test_bad_settings(setting, words):
    with pytest.raises(ValueError, match=words):
        HttpConfig(**setting)


@pytest.mark.parametrize("name", ["header_timeout", "write_timeout", "max_header_bytes"])
def test_bad_server_settings(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        ServerConfig(**{name: 0 if name == "max_header_bytes" else 0.0})
