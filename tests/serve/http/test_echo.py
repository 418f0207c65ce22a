"""Completions that repeat their prompt: text, log-probabilities, streams."""

import pytest

from tests.serve.http.ask import chat, complete, events, words
from tests.serve.http.fake import TINY, WORDS


@pytest.mark.parametrize("logprobs", [None, 2])
def test_an_echo_begins_with_the_prompt(client, service, logprobs):
    answer = complete(client, prompt=["a b", "c"], seed=2, n=2, echo=True, logprobs=logprobs)
    texts = [front + words(2 + i) for front in ("a b", "c") for i in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["completion_tokens"] == 4 * 4
    assert answer["usage"]["prompt_tokens"] == sum(len(call[0]) for call in service.calls)
    options = service.calls[0][1]
    assert options.echo and options.sampling.prompt_logprobs == logprobs
    if logprobs is None:
        assert answer["choices"][0]["logprobs"] is None
        return
    found = answer["choices"][0]["logprobs"]
    prompt = [TINY.decode([token]) for token in service.calls[0][0]]
    assert found["tokens"] == [*prompt, *WORDS[2:6]]
    assert found["token_logprobs"] == [None] + [-1.0] * (len(prompt) - 1) + [-0.25] * 4
    assert found["top_logprobs"][:2] == [None, {prompt[1]: -1.0}]
    starts = [len("".join(found["tokens"][:place])) for place in range(len(found["tokens"]))]
    assert found["text_offset"] == starts


def test_an_echo_without_new_tokens(client, service):
    """As long as the model's longest, too."""
    for prompt in ("hi", [5] * 256):
        answer = complete(client, prompt=prompt, echo=True, max_tokens=0, logprobs=0, n=2, seed=0)
        for choice in answer["choices"]:
            assert choice["text"] == ("hi" if prompt == "hi" else TINY.decode(prompt))
            assert choice["finish_reason"] == "length"
            assert len(choice["logprobs"]["tokens"]) == len(service.calls[-1][0])
        assert answer["usage"]["completion_tokens"] == 0
        assert service.calls[-1][1].stop.max_tokens == 0


def test_without_echo_no_prompt_is_scored(client, service):
    complete(client, logprobs=2, echo=False)
    chat(client, logprobs=True, echo=False)
    for _, options, _ in service.calls:
        assert not options.echo and options.sampling.prompt_logprobs is None


def test_an_id_without_a_text_cannot_be_echoed(client, service, monkeypatch):
    def token_bytes(id_, **_):
        if id_ == 7:
            raise ValueError("id 7 has no token")
        return b"x"

    monkeypatch.setattr(service.tokenizer, "token_bytes", token_bytes)
    body = {"model": "org/fake", "prompt": [[5, 6], [5, 7]], "max_tokens": 1}
    refused = client.post("/v1/completions", json={**body, "echo": True})
    assert refused.status_code == 400 and not service.calls
    assert refused.json()["error"]["message"] == "the prompt cannot be echoed: id 7 has no token"
    assert client.post("/v1/completions", json=body).status_code == 200


def test_a_stream_sends_the_prompt_first(client, service):
    *found, done = events(client, prompt="a b", seed=2, n=2, echo=True, logprobs=0, max_tokens=2)
    assert done == "[DONE]"
    prompt = [TINY.decode([token]) for token in service.calls[0][0]]
    for index in range(2):
        parts = [c for event in found for c in event["choices"] if c["index"] == index]
        assert [part["text"] for part in parts] == ["a b" + WORDS[2 + index], WORDS[3 + index]]
        first, second = (part["logprobs"] for part in parts)
        assert first["tokens"] == [*prompt, WORDS[2 + index]]
        assert first["token_logprobs"][0] is None
        assert second["text_offset"] == [len("".join(first["tokens"]))]
