"""Requests as lm-evaluation-harness sends them, and answers read as it reads them.

The client below does what `local-completions` and `local-chat-completions` do (the harness's
`lm_eval/models/openai_completions.py` and `api_models.py`): which fields, in which form, and which
part of an answer counts.
"""

import json
import re
from pathlib import Path

import pytest

from tests.serve.http.fake import TINY, WORDS

SEED = 1234  # the harness's own
DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"


def scoring(model, rows):
    """Contexts and continuations, joined, as ids."""
    return {
        "model": model,
        "prompt": rows,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": SEED,
        "echo": True,
    }


def generation(model, **prompt):
    body = {"model": model, "max_tokens": 256, "temperature": 0, "stop": ["\n\n"], "seed": SEED}
    return prompt | body


def read_scores(answer, context_lengths):
    """(log-probability of the continuation, whether it is the greedy one) of each choice."""
    found = []
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for choice, n in zip(choices, context_lengths, strict=True):
        columns = choice["logprobs"]
        values = columns["token_logprobs"][n:-1]
        tops = columns["top_logprobs"][n:-1]
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        found.append((sum(values), greedy))
    return found


def post(client, route, body):
    response = client.post(route, json=body, headers={"Authorization": "Bearer none"})
    assert response.status_code == 200, response.text
    return response.json()


def test_an_echo_has_an_entry_for_every_id_and_one_more(client, service):
    rows = [TINY.encode("the road to the house", bos=True), TINY.encode("ab", bos=True)]
    answer = post(client, "/v1/completions", scoring("org/fake", rows))
    assert [prompt for prompt, _, _ in service.calls] == rows
    for choice, ids in zip(answer["choices"], rows, strict=True):
        columns = choice["logprobs"]
        assert [len(column) for column in columns.values()] == [len(ids) + 1] * 4
        assert columns["token_logprobs"][0] is None is columns["top_logprobs"][0]
        assert columns["token_logprobs"][1:] == [-1.0] * (len(ids) - 1) + [-0.25]
        assert columns["tokens"][-1] == WORDS[SEED % 7]
    assert read_scores(answer, [2, 1]) == [(-(len(rows[0]) - 2), True), (-(len(rows[1]) - 1), True)]


@pytest.mark.parametrize("stop", [[], ["Question:"], ["Question:", "</s>", "\n", "<|im_end|>"]])
def test_generation(client, service, stop):
    for body in (
        generation("org/fake", prompt="Question: 1 + 1?\nAnswer:"),
        generation("org/fake", prompt=[TINY.encode("1 + 1 =", bos=True)]),
    ):
        answer = post(client, "/v1/completions", body | {"max_tokens": 64, "stop": stop})
        assert answer["choices"][0]["text"] == "".join(WORDS[SEED % 7 :][:4])
        _, options, _ = service.calls[-1]
        assert options.stop.stop == tuple(stop) and options.sampling.temperature == 0


def test_the_requests_of_the_documentation_are_those_of_the_harness(client):
    blocks = re.findall(r"```json\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
    told, scored = (json.loads(block) for block in blocks)
    assert scored == scoring("NAME", scored["prompt"])
    assert told.keys() == generation("NAME", prompt="").keys() and told["seed"] == SEED
    for body in (told, scored):
        post(client, "/v1/completions", body | {"model": "org/fake", "max_tokens": 1})


def test_a_chat_whose_messages_have_a_type(client, service):
    messages = [
        {"role": "system", "content": "Be brief.", "type": "text"},
        {"role": "user", "content": "1 + 1?", "type": "text"},
    ]
    body = generation("org/fake", messages=messages) | {"max_tokens": 64}
    answer = post(client, "/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"]
    without = [{k: v for k, v in message.items() if k != "type"} for message in messages]
    post(client, "/v1/chat/completions", body | {"messages": without})
    assert service.calls[0][0] == service.calls[1][0]
    messages[0]["type"] = "image_url"
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and "messages.0.type" in refused.json()["error"]["message"]
