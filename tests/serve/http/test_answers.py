"""Answers and streams in process: their shape, usage, seeds, and how failures look."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from dskjax.tokenizer import THINK
from serve.api import OverloadedError, UnavailableError
from serve.http import HttpConfig, create_app
from serve.http.errors import dumps
from serve.request import FinishReason
from tests.serve.http.ask import chat, complete, events, words
from tests.serve.http.fake import TINY, FakeService

# ------------------------------------------------------------------ whole answers


def test_a_completion(client, service):
    answer = complete(client, seed=3)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["model"] == "org/fake"
    choice = {"index": 0, "text": words(3), "logprobs": None}
    assert answer["choices"] == [{**choice, "finish_reason": "stop", "stop_reason": None}]
    assert answer["usage"] == {
        "prompt_tokens": 1 + len(TINY.encode("hi")),
        "completion_tokens": 4,
        "total_tokens": 5 + len(TINY.encode("hi")),
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 4,
            "rejected_prediction_tokens": 4,
        },
    }
    plain = {"accept": "rejection", "lossless": True, "drafted": 8, "accepted": 4}
    assert answer["dskjax"] == plain
    prompt, options, id_ = service.calls[0]
    assert prompt == TINY.encode("hi", bos=True) and id_ == answer["id"]
    assert options.stop.max_tokens == service.max_model_len - len(prompt)


def test_max_tokens_ends_with_length(client):
    choice = complete(client, max_tokens=2)["choices"][0]
    assert choice["finish_reason"] == "length"


def test_default_max_tokens_is_capped_by_the_server(service):
    with TestClient(create_app(service, HttpConfig(default_max_tokens=3))) as client:
        complete(client)
        complete(client, max_tokens=7)
    assert [options.stop.max_tokens for _, options, _ in service.calls] == [3, 7]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [TINY.encode("a", bos=True)]),
        ("", [[0]]),
        (["a", THINK], [[0, *TINY.encode(t, parse_special=False)] for t in ("a", THINK)]),
        ([5, 6142, 7], [[5, 6142, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts(client, service, prompt, expected):
    answer = complete(client, prompt=prompt, n=2, seed=0)
    assert [call[0] for call in service.calls] == expected
    assert [choice["index"] for choice in answer["choices"]] == [*range(2 * len(expected))]
    assert [choice["text"] for choice in answer["choices"]] == [words(0), words(1)] * len(expected)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 8 * len(expected)
    assert len({id_ for _, _, id_ in service.calls}) == len(expected)


def test_every_option_reaches_the_service(client, service):
    complete(
        client,
        **{"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1},
        **{"presence_penalty": 1, "frequency_penalty": -1.5, "repetition_penalty": 1.25},
        **{"logit_bias": {"5": 1, "17": -100}, "seed": 11, "logprobs": 3, "n": 2, "best_of": 2},
        **{"stop": ["\n", "x"], "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 2},
        **{"priority": -4, "cache_salt": "s", "speculate": 0, "skip_special_tokens": False},
        **{"accept": {"name": "typical", "eps": 0.25}, "user": "u", "metadata": {"a": [1]}},
    )
    options = service.calls[0][1]
    sampling, stop = options.sampling, options.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 4)
    assert (sampling.min_p, sampling.seed, sampling.logprobs) == (0.1, 11, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert sampling.repetition_penalty == 1.25 and sampling.logit_bias == ((5, 1), (17, -100))
    assert (stop.max_tokens, stop.min_tokens, stop.stop) == (9, 2, ("\n", "x"))
    assert (stop.stop_token_ids, stop.ignore_eos) == ((7,), True)
    assert options.accept is not None and options.accept.label == "typical:eps=0.25"
    assert (options.drafts, options.n, options.priority, options.salt) == (0, 2, -4, "s")
    assert options.echo_special and not options.split_reasoning


def test_what_is_left_out_or_null_is_the_default(client, service):
    complete(client, stop=None, temperature=None, logit_bias=None, accept=None, tools=None)
    options = service.calls[0][1]
    assert (options.sampling.temperature, options.stop.stop) == (1.0, ())
    assert (options.accept, options.drafts, options.sampling.logprobs) == (None, None, None)


def test_a_lossy_rule_says_so(client):
    extras = complete(client, accept="typical:eps=0.5")["dskjax"]
    assert extras["accept"] == "typical:eps=0.5" and extras["lossless"] is False


def test_synthetic_acceptance_is_announced_everywhere(client, service):
    service.synthetic = True
    assert complete(client)["dskjax"]["synthetic_acceptance"] is True
    assert all(e["dskjax"]["synthetic_acceptance"] for e in events(client)[:-1])


def test_requests_without_a_seed_get_different_ones(client, service):
    for _ in range(20):
        complete(client, prompt=["a", "b"])
    seeds = [options.sampling.seed for _, options, _ in service.calls]
    assert len(set(seeds)) == 40


def test_completion_logprobs(client):
    found = complete(client, seed=2, logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    assert found["tokens"] == ["blue ", "grün ", "青 "]
    assert found["token_logprobs"] == [-0.25] * 3 and found["text_offset"] == [0, 5, 10]
    assert found["top_logprobs"][0] == {"t0": -0.5, "never": -9999.0, "blue ": -0.25}
    alone = complete(client, seed=2, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert alone["top_logprobs"] == [{"blue ": -0.25}]


def test_chat_logprobs(client, service):
    found = chat(client, logprobs=True, top_logprobs=1, seed=3, max_tokens=1)["choices"][0]
    never = {"token": "never", "logprob": -9999.0, "bytes": [110, 101, 118, 101, 114]}
    word = {"token": "grün ", "logprob": -0.25, "bytes": list("grün ".encode())}
    assert found["logprobs"]["content"] == [{**word, "top_logprobs": [never]}]
    assert chat(client, logprobs=False)["choices"][0]["logprobs"] is None
    assert service.calls[1][1].sampling.logprobs is None
    chat(client, logprobs=True)
    assert service.calls[2][1].sampling.logprobs == 0


def test_chat_splits_reasoning(client, service):
    answer = chat(client, seed=0, chat_template_kwargs={"thinking": True})
    message = {"role": "assistant", "content": "blue grün ", "reasoning_content": "red green "}
    assert answer["choices"][0]["message"] == {**message, "refusal": None}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert service.calls[0][1].thinking and service.calls[0][1].split_reasoning
    plain = chat(client, seed=0, chat_template_kwargs={"thinking": False})["choices"][0]["message"]
    assert plain["reasoning_content"] is None and plain["content"] == words(0)
    assert not service.calls[1][1].thinking


def test_both_names_of_max_tokens(client, service):
    chat(client, max_completion_tokens=2)
    chat(client, max_tokens=2)
    chat(client, max_tokens=2, max_completion_tokens=2)
    assert [options.stop.max_tokens for _, options, _ in service.calls] == [2, 2, 2]


def test_an_answer_can_be_sent_back(client, service):
    message = chat(client)["choices"][0]["message"]
    more = {"annotations": [], "tool_calls": None, "audio": None}
    turns = [
        {"role": "user", "content": "hi"},
        {**message, **more},
        {"role": "user", "content": "?"},
    ]
    chat(client, messages=turns)
    text = TINY.decode(service.calls[1][0])
    assert message["content"] in text and text.endswith("?<｜Assistant｜></think>")


# ------------------------------------------------------------------ streams


def test_a_stream_of_completions(client):
    found = events(client, n=2, seed=5, max_tokens=3)
    assert found.pop() == "[DONE]"
    texts, ends = {0: "", 1: ""}, {}
    for event in found:
        assert event["object"] == "text_completion" and "usage" not in event
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == {0: words(5, 3), 1: words(6, 3)} and ends == {0: "length", 1: "length"}
    assert [("dskjax" in event) for event in found] == [False] * 5 + [True]
    assert found[-1]["dskjax"]["drafted"] == 12


def test_a_stream_of_several_prompts(client):
    found = events(
        client, prompt=["a", "b", "c"], n=2, seed=0, stream_options={"include_usage": True}
    )
    assert found.pop() == "[DONE]"
    last = found.pop()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 24
    texts = [""] * 6
    for event in found:
        assert event["usage"] is None
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [words(0), words(1)] * 3


def test_a_chat_stream_with_reasoning(client):
    found = events(client, "/v1/chat/completions", seed=0, chat_template_kwargs={"thinking": True})
    assert found.pop() == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in found]
    assert deltas[0] == {"role": "assistant", "content": "", "reasoning_content": "red "}
    assert deltas[1:] == [
        {"reasoning_content": "green "},
        {"content": "blue "},
        {"content": "grün "},
    ]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}


def test_stream_logprobs_have_running_offsets(client):
    found = events(client, seed=2, logprobs=0, max_tokens=3)[:-1]
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in found]
    assert offsets == [[0], [5], [10]]
    found = events(client, "/v1/chat/completions", seed=2, logprobs=True)[:-1]
    tokens = [event["choices"][0]["logprobs"]["content"][0]["token"] for event in found]
    assert "".join(tokens) == words(2)


# ------------------------------------------------------------------ failures

REFUSALS = [
    (ValueError("too long"), 400, "invalid_request_error", None),
    (OverloadedError("full", 2.5), 429, "rate_limit_error", "3"),
    (UnavailableError("starting"), 503, "service_unavailable_error", "1"),
]


@pytest.mark.parametrize(("error", "status", "kind", "retry"), REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_refusals_have_a_status(client, service, error, status, kind, retry, stream, prompt):
    service.refusal = error
    body = {"model": "org/fake", "prompt": prompt, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status and answer.headers.get("retry-after") == retry
    found = answer.json()["error"]
    assert found["type"] == kind and found["message"] == str(error)


FAILURES = [
    ((FinishReason.ERROR, "page fault"), 500, "server_error", "page fault"),
    ((FinishReason.ABORT, ""), 503, "service_unavailable_error", "the request was aborted"),
]


@pytest.mark.parametrize(("finish", "status", "kind", "message"), FAILURES)
@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_a_failed_answer(client, service, finish, status, kind, message, prompt):
    service.finish = finish
    body = {"model": "org/fake", "prompt": prompt}
    answer = client.post("/v1/completions", json=body)
    error = {"message": message, "type": kind, "param": None}
    assert answer.status_code == status
    assert answer.json()["error"].items() >= error.items()
    *pieces, last = events(client, prompt=prompt)
    assert len(pieces) >= 1 and "[DONE]" not in pieces
    assert last["error"].items() >= error.items()


def test_a_stream_that_fails_before_its_first_piece_has_a_status(client, service):
    service.finish, service.at = (FinishReason.ERROR, "no page"), 0
    body = {"model": "org/fake", "prompt": "a", "stream": True}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "no page"


@pytest.mark.parametrize("fault", [RuntimeError("secret path"), ValueError("secret path")])
def test_a_fault_tells_nothing_of_the_inside(service, fault, caplog):
    """A ValueError is the client's only before the first piece."""
    service.fault = fault
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json={"model": "org/fake", "prompt": "a"})
        assert answer.status_code == 500 and "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        *_, last = events(client)
        assert last["error"]["type"] == "server_error" and "secret" not in str(last)
        assert "secret path" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_without_an_end_is_a_fault(stream, n):
    """The last of the n never says that it ended."""

    class Forgetful(FakeService):
        def _output(self, prompt, options, index, step, count):
            output = super()._output(prompt, options, index, step, count)
            return dataclasses.replace(output, finish=None) if index == n - 1 else output

    forgetful = Forgetful()
    with TestClient(create_app(forgetful), raise_server_exceptions=False) as client:
        body = {"model": "org/fake", "prompt": "a", "stream": stream, "n": n}
        answer = client.post("/v1/completions", json=body)
    assert "server_error" in answer.text and "[DONE]" not in answer.text
    assert forgetful.open == 0


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
@pytest.mark.parametrize("finish", [None, (FinishReason.ERROR, "page fault")])
def test_an_iterator_is_closed_and_not_only_forgotten(service, prompt, finish):
    """One that is no generator has nobody else to close it."""
    service.finish = finish
    opened, closed = [], []

    class Pieces:
        def __init__(self, inner):
            opened.append(self)
            self._inner = inner

        def __aiter__(self):
            return self

        async def __anext__(self):
            return await anext(self._inner)

        async def aclose(self):
            closed.append(self)
            await self._inner.aclose()

    generate = service.generate
    service.generate = lambda *a, **k: Pieces(generate(*a, **k))
    with TestClient(create_app(service)) as client:
        client.post("/v1/completions", json={"model": "org/fake", "prompt": prompt})
    assert opened and set(opened) == set(closed)


@given(st.text())
def test_an_event_is_one_line_for_everybody(text):
    line = dumps({"text": text}).decode()
    assert len(line.splitlines()) == 1 and json.loads(line) == {"text": text}
