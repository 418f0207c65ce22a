"""OpenAI's own client against a listening server."""

import asyncio

import openai
import pytest

from serve.api import OverloadedError, UnavailableError
from serve.http import HttpConfig, create_app
from serve.request import FinishReason
from tests.serve.http.fake import WORDS, FakeService, listening

MESSAGES = [{"role": "user", "content": "hi"}]
TEXT = "".join(WORDS[:4])


@pytest.fixture(scope="module")
def server():
    fake = FakeService()
    with listening(create_app(fake, HttpConfig(api_keys=("key",)))) as port:
        yield fake, f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def fake(server):
    server[0].__init__()
    yield server[0]
    assert server[0].open == 0


@pytest.fixture
def client(fake, server):
    with openai.OpenAI(base_url=server[1], api_key="key", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(
        model="org/fake", messages=MESSAGES, seed=0, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, "".join(WORDS[1:5])]
    token = answer.choices[0].logprobs.content[0]
    assert (token.token, token.logprob, len(token.top_logprobs)) == ("red ", -0.25, 3)
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.dskjax["accept"] == "rejection"


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="org/fake",
        messages=MESSAGES,
        seed=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"chat_template_kwargs": {"thinking": True}},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == "".join(WORDS[2:4])
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == "".join(WORDS[:2])
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.total_tokens == last.usage.prompt_tokens + 4


def test_completions(client):
    answer = client.completions.create(
        model="org/fake", prompt=["a", "b"], seed=0, logprobs=1, max_tokens=2, stop=["x"]
    )
    assert [choice.text for choice in answer.choices] == ["".join(WORDS[:2])] * 2
    assert answer.choices[0].logprobs.tokens == list(WORDS[:2])
    assert answer.choices[0].finish_reason == "length"
    stream = client.completions.create(model="org/fake", prompt="a", seed=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_models(client):
    assert [model.id for model in client.models.list()] == ["org/fake"]
    assert client.models.retrieve("org/fake").created == 1_700_000_000


def test_async(fake, server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server[1], api_key="key", max_retries=0) as client:
            create = client.chat.completions.create
            whole = [create(model="org/fake", messages=MESSAGES, seed=0) for _ in range(8)]
            stream = await create(model="org/fake", messages=MESSAGES, seed=0, stream=True)
            text = [chunk.choices[0].delta.content async for chunk in stream]
            return [a.choices[0].message.content for a in await asyncio.gather(*whole)], text

    answers, text = asyncio.run(ask())
    assert answers == [TEXT] * 8 and "".join(text) == TEXT


def create(client, **changes):
    return client.completions.create(**{"model": "org/fake", "prompt": "a", **changes})


def test_errors_are_the_clients_own(client, fake, server):
    with pytest.raises(openai.BadRequestError, match="top_p=3") as caught:
        create(client, top_p=3)
    assert caught.value.param == "top_p" and caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with openai.OpenAI(base_url=server[1], api_key="other", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            create(stranger)
    fake.refusal = OverloadedError("full", 4.2)
    with pytest.raises(openai.RateLimitError) as caught:
        create(client, stream=True)
    assert caught.value.response.headers["retry-after"] == "5"
    fake.refusal = UnavailableError("draining")
    with pytest.raises(openai.InternalServerError) as caught:
        create(client)
    assert caught.value.status_code == 503


def test_a_client_that_retries_gets_through(fake, server):
    fake.refusal = OverloadedError("full", 0.01)
    with openai.OpenAI(base_url=server[1], api_key="key", max_retries=1) as client:
        calls = fake.calls

        class Once(list):
            def append(self, item):
                super().append(item)
                if len(self) == 2:
                    fake.refusal = None

        fake.calls = Once(calls)
        assert create(client, seed=0).choices[0].text == TEXT
    assert len(fake.calls) == 2


def test_a_stream_that_fails_raises_in_the_client(client, fake):
    fake.finish = (FinishReason.ERROR, "page fault")
    stream = create(client, stream=True, seed=0)
    assert next(stream).choices[0].text == WORDS[0]
    with pytest.raises(openai.APIError, match="page fault"):
        list(stream)
    fake.finish = (FinishReason.ABORT, "")
    with pytest.raises(openai.InternalServerError):
        create(client)
