"""Whatever a body holds, the answer is an OpenAI error object that names what is wrong."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from serve.http import HttpConfig, create_app
from serve.http.schema import IGNORED, ChatBody, CompletionBody
from tests.serve.http.fake import FakeService

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def module_service():
    return FakeService()


@pytest.fixture(scope="module")
def client(module_service):
    """One app for the whole table: a refused request leaves nothing behind that the next sees."""
    with TestClient(create_app(module_service, HttpConfig())) as client:
        yield client


@pytest.fixture
def service(module_service):
    module_service.calls.clear()
    yield module_service
    assert module_service.open == 0


def error_of(answer, status=400):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    return error


# Fields of a completion, the parameter that the error names, words of its message.
COMPLETION_TABLE = [
    ({"model": 5}, "model", "valid string"),
    ({"prompt": 5}, "prompt", "give text"),
    ({"prompt": []}, "prompt", "give text"),
    ({"prompt": ["a", 5]}, "prompt", "give text"),
    ({"prompt": [5, "a"]}, "prompt", "give text"),
    ({"prompt": [True]}, "prompt", "give text"),
    ({"prompt": [[5], []]}, "prompt", "give text"),
    ({"prompt": [[5], [True]]}, "prompt", "give text"),
    ({"prompt": [[5], 6]}, "prompt", "give text"),
    ({"prompt": [1.0]}, "prompt", "give text"),
    ({"prompt": {"text": "a"}}, "prompt", "give text"),
    ({"prompt": [6144]}, "prompt", "6144: ids are 0 to 6143"),
    ({"prompt": [[5], [-1]]}, "prompt", "id -1"),
    ({"prompt": ["a"] * 65}, "prompt", "65 prompts: give at most 64"),
    ({"prompt": [5] * 256}, "prompt", "256 tokens, which with at least 1 new token is more than"),
    ({"prompt": [5] * 250, "max_tokens": 7}, "prompt", "250 tokens, which with max_tokens=7"),
    ({"max_tokens": 10_000}, "prompt", "256 tokens: shorten"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens=-1"),
    ({"max_tokens": "5"}, "max_tokens", "'5'"),
    ({"max_tokens": True}, "max_tokens", "True"),
    ({"max_tokens": 5.0}, "max_tokens", "5.0"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown"),
    ({"temperature": -0.1}, "temperature", "temperature=-0.1"),
    ({"temperature": "1"}, "temperature", "'1'"),
    ({"temperature": True}, "temperature", "True"),
    ({"temperature": 101}, "temperature", "to 100"),
    ({"top_p": 1.1}, "top_p", "top_p=1.1"),
    ({"top_p": -1}, "top_p", "top_p=-1"),
    ({"top_k": -1}, "top_k", "top_k=-1"),
    ({"top_k": 2**40}, "top_k", "top_k="),
    ({"top_k": 1.5}, "top_k", "1.5"),
    ({"min_p": 2}, "min_p", "min_p=2"),
    ({"presence_penalty": 3}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "-2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "0.01"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"n": True}, "n", "True"),
    ({"n": 2, "best_of": 3}, "best_of", "must equal n=2"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"logprobs": -1}, "logprobs", "-1"),
    ({"logprobs": True}, "logprobs", "True"),
    ({"stop": ["a"] * 17}, "stop", "17 stop strings"),
    ({"stop": [""]}, "stop", "1 to 256"),
    ({"stop": "x" * 300}, "stop", "1 to 256"),
    ({"stop": [5]}, "stop.0", "valid string"),
    ({"stop": 5}, "stop", "valid list"),
    ({"stop_token_ids": [6144]}, "stop_token_ids", "6144"),
    ({"stop_token_ids": [5] * 8}, "stop_token_ids", "at most 7"),
    ({"stop_token_ids": ["5"]}, "stop_token_ids.0", "valid integer"),
    ({"min_tokens": -1}, "min_tokens", "min_tokens=-1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens=9"),
    ({"seed": -1}, "seed", "seed=-1"),
    ({"seed": 2**32}, "seed", "seed=4294967296"),
    ({"seed": 2**32 - 1, "n": 2}, "seed", "2**32 - n"),
    ({"seed": "1"}, "seed", "'1'"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"logit_bias": {"01": 1}}, "logit_bias", "'01'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"٣": 1}}, "logit_bias", "'٣'"),
    ({"logit_bias": {"6144": 1}}, "logit_bias", "6144"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "valid number"),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "301 entries"),
    ({"logit_bias": [5]}, "logit_bias", "valid dictionary"),
    ({"stream": "true"}, "stream", "valid boolean"),
    ({"stream": 1}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown"),
    ({"priority": 2**31}, "priority", "less than"),
    ({"cache_salt": "s" * 257}, "cache_salt", "256"),
    ({"speculate": -1}, "speculate", "greater"),
    ({"speculate": True}, "speculate", "True"),
    ({"accept": "best"}, "accept", "unknown acceptance rule 'best'"),
    ({"accept": "typical:eps=2"}, "accept", "typical_eps=2.0"),
    ({"accept": {"name": "typical", "eps": "0.1"}}, "accept", "must be a number"),
    ({"accept": {"name": "typical", "eps": True}}, "accept", "must be a number"),
    ({"accept": {"name": "typical", "e,delta=1": 1}}, "accept", "no parameter"),
    ({"accept": {"name": "typical", "top_n": 1}}, "accept", "typical"),
    ({"accept": {"eps": 0.1}}, "accept", "give a rule"),
    ({"accept": 5}, "accept", "give a rule"),
    ({"echo": 0}, "echo", "valid boolean"),
    ({"echo": True, "max_tokens": -1}, "max_tokens", "use 0 or more"),
    ({"echo": True, "max_tokens": 0, "prompt": [5] * 257}, "prompt", "257 tokens, which with max"),
    ({"echo": True, "logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "unknown"),
    ({"x" * 500: 1}, "x" * 80, "unknown parameter"),
]

CHAT_TABLE = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "valid list"),
    ({"messages": ["hi"]}, "messages.0", "dictionary"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role", "'user'"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.role", "'tool'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "give text"),
    (
        {"messages": [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.1.content",
        "only parts of type text",
    ),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content", "only parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages.0.content",
        "a text part is",
    ),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages.0.tool_calls", "unknown"),
    ({"messages": [{**USER, "x": 1}]}, "messages.0.x", "unknown"),
    ({"messages": [{"role": "user", "content": "a " * 300}]}, "messages", "256 tokens"),
    ({"prompt": "a"}, "prompt", "unknown"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"max_completion_tokens": 0}, "max_tokens", "at least 1"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"chat_template": "{{ x }}"}, "chat_template", "not supported"),
    ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking", "boolean"),
    ({"chat_template_kwargs": {"x": True}}, "chat_template_kwargs.x", "unknown"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
    ({"modalities": ["audio"]}, "modalities", "not supported"),
    ({"audio": {}}, "audio", "not supported"),
    ({"prediction": {"content": "x"}}, "prediction", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "chat_template_kwargs"),
    ({"web_search_options": {}}, "web_search_options", "not supported"),
    ({"best_of": 1}, "best_of", "unknown"),
    ({"echo": True}, "echo", "not supported"),
    ({"echo": 0}, "echo", "not supported"),
    ({"n": 17}, "n", "at most 16"),
]


@pytest.mark.parametrize(("fields", "param", "words"), COMPLETION_TABLE)
def test_bad_completions(client, service, fields, param, words):
    body = {"model": "org/fake", "prompt": "hi", **fields}
    error = error_of(client.post(COMPLETIONS, json=body))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"]
    assert len(error["message"]) < 700 and not service.calls


@pytest.mark.parametrize(("fields", "param", "words"), CHAT_TABLE)
def test_bad_chats(client, service, fields, param, words):
    body = {"model": "org/fake", "messages": [USER], **fields}
    error = error_of(client.post(CHAT, json=body))
    assert error["param"] == param and words in error["message"]
    assert not service.calls


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [], "function_call": "none", "modalities": ["text"]},
        {"suffix": "", "echo": False, "continue_final_message": False},
        {name: {"any": ["thing"]} for name in IGNORED},
    ],
)
def test_what_asks_for_nothing_is_accepted(client, fields):
    for path, body in ((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": [USER]})):
        assert client.post(path, json={"model": "org/fake", **body, **fields}).status_code == 200


@pytest.mark.parametrize(("path", "field"), [(COMPLETIONS, "prompt"), (CHAT, "messages")])
def test_required_fields(client, path, field):
    error = error_of(client.post(path, json={"model": "org/fake"}))
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")
    assert error_of(client.post(path, json={field: "x"}))["code"] in (
        "missing_required_parameter",
        "invalid_value",
    )


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": [USER]})]
)
def test_another_model(client, path, body):
    error = error_of(client.post(path, json={"model": "gpt-4", **body}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'gpt-4'" in error["message"] and "'org/fake'" in error["message"]


# ------------------------------------------------------------------ JSON

BROKEN = [
    (b"", "not JSON"),
    (b"{", "line 1 column 2"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b'{"model": "\xff"}', "not UTF-8 (byte 11)"),
    (b"\xef\xbb\xbf{}", "not JSON"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": Infinity}', "Infinity"),
    (b'{"temperature": -Infinity}', "-Infinity"),
    (b'{"temperature": 1e999}', "1e999"),
    (b'{"seed": 9223372036854775808}', "64 bits"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "64 bits"),
    (b'{"n": 1, "n": 2}', "'n' is given twice"),
    (b'{"metadata": {"a": 1, "a": 1}}', "'a' is given twice"),
    (b'{"metadata": ' + b"[" * 40 + b"]" * 40 + b"}", "32 levels"),
    (b'{"metadata": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "32 levels"),
    (b'{"metadata": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_000 + b"}", "32 levels"),
    (b'{"model": "\\ud800"}', "surrogate"),
    (b'{"\\udfff": 1}', "surrogate"),
    (b'{"metadata": [["\\ud800x"]]}', "surrogate"),
    (b'{"a": 1} x', "Extra data"),
]


@pytest.mark.parametrize(("raw", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_broken_json(client, raw, words):
    answer = client.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert words in error["message"] and error["code"] == "invalid_json"


def test_a_pair_of_surrogates_is_a_character(client, service):
    raw = b'{"model": "org/fake", "prompt": "\\ud83d\\ude00"}'
    answer = client.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert service.tokenizer.decode(service.calls[0][0][1:]) == "😀"


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""]
)
def test_other_content_types(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    error = error_of(client.post(COMPLETIONS, content=b"{}", headers=headers), 415)
    assert "application/json" in error["message"]


def test_a_charset_is_no_other_content_type(client):
    raw = json.dumps({"model": "org/fake", "prompt": "a"})
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(COMPLETIONS, content=raw, headers=headers).status_code == 200


# ------------------------------------------------------------------ routes


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/completions/", "/v2/models", "/docs", "/openapi.json"]
)
def test_unknown_routes(client, path):
    error = error_of(client.get(path), 404)
    assert error["code"] == "not_found" and path in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("PUT", CHAT, "POST"),
        ("DELETE", "/v1/models/org/fake", "GET"),
        ("POST", "/health", "GET"),
        ("OPTIONS", COMPLETIONS, "POST"),
    ],
)
def test_wrong_methods(client, method, path, allowed):
    answer = client.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


# ------------------------------------------------------------------ anything at all

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["strict", "typical:eps=0.1", "org/fake", "user", "<think>", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values},
        optional={"content": json_values | st.text(), "name": json_values, "x": json_values},
    ),
    max_size=3,
)


def bodies(kind, base):
    fields = [*kind.model_fields, *IGNORED, "tools", "response_format", "zzz"]
    mutations = st.dictionaries(st.sampled_from(fields), json_values, max_size=3)
    return mutations.map(lambda fields: {**base, **fields})


calls = st.one_of(
    bodies(CompletionBody, {"model": "org/fake", "prompt": "a"}).map(lambda b: (COMPLETIONS, b)),
    bodies(ChatBody, {"model": "org/fake", "messages": [USER]}).map(lambda b: (CHAT, b)),
    messages.map(lambda m: (CHAT, {"model": "org/fake", "messages": m})),
    json_values.map(lambda v: ("/tokenize", {"prompt": v})),
    messages.map(lambda m: ("/tokenize", {"messages": m})),
    json_values.map(lambda v: ("/detokenize", {"tokens": v})),
    json_values.map(lambda v: (COMPLETIONS, v)),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(calls)
def test_no_body_is_a_fault_or_leaves_anything(client, module_service, call):
    path, body = call
    raw = json.dumps(body)
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        error_of(answer, answer.status_code)
    assert module_service.open == 0


@given(st.binary(max_size=60), st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]))
def test_no_bytes_are_a_fault(client, raw, path):
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    error_of(answer)
