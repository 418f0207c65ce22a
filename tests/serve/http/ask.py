"""Requests to the fake service that must be answered, and the texts it answers with."""

import json

from tests.serve.http.fake import WORDS


def complete(client, **body):
    answer = client.post("/v1/completions", json={"model": "org/fake", "prompt": "hi", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(client, **body):
    messages = [{"role": "user", "content": "hi"}]
    answer = client.post(
        "/v1/chat/completions", json={"model": "org/fake", "messages": messages, **body}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client, path="/v1/completions", **body):
    """The parsed events of a stream; "[DONE]" as it is."""
    asked = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {}
    asked = asked or {"prompt": "hi"}
    answer = client.post(path, json={"model": "org/fake", "stream": True, **asked, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    texts = [part.removeprefix("data: ") for part in parts]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def words(seed, count=4):
    return "".join(WORDS[(seed + i) % len(WORDS)] for i in range(count))
