"""Log-likelihoods of continuations, as lm-evaluation-harness asks a server for them.

Request and arithmetic are those of its `local-completions` models
(https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/openai_completions.py).
"""

import dataclasses
import json

import httpx2
import numpy as np
import pytest

from dskjax.decode.rules import RuleOptions
from serve import runner
from tests.serve.http.test_lm_eval import post, read_scores, scoring
from tests.serve.http_stack import LETTERS, alone, serving
from tests.serve.scores import ATOL, exact
from tests.serve.stack import small

MODULES = 1
QUESTION = {"model": "toy", "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}


@pytest.fixture(scope="module")
def stack():
    strict = {"rules": ("strict",), "accept": RuleOptions(name="strict")}
    with serving(small(prompt_logprobs=True, drafts=1, chunk=8, **strict), MODULES) as stack:
        yield stack


@pytest.fixture
def ask(stack):
    """Posts a completion; the response."""

    def post(**body):
        url = f"http://127.0.0.1:{stack.port}/v1/completions"
        return httpx2.post(url, json=QUESTION | body, timeout=120)

    return post


def tasks():
    """(context, continuation) of ids; every third continuation is what the model itself says."""
    rng = np.random.default_rng(0)
    found = []
    for n, length in enumerate((1, 2, 5, 15, 16, 17, 31, 40, 48)):
        context = rng.integers(0, 5, length).tolist()
        own = rng.integers(0, 5, 1 + n).tolist() if n % 3 else alone(tuple(context))[: 1 + n]
        found.append((context, own))
    return found


def likelihoods(answer, some, max_tokens):
    """(sum of the continuation's log-probabilities, whether it is the greedy one) of each task."""
    found = []
    for choice, (context, own) in zip(answer["choices"], some, strict=True):
        part = slice(len(context), -max_tokens or None)
        logprobs = choice["logprobs"]["token_logprobs"][part]
        tops = choice["logprobs"]["top_logprobs"][part]
        assert len(logprobs) == len(own)
        best = [max(top.values()) for top in tops]
        found.append((sum(logprobs), logprobs == best))
    return found


def direct(some):
    """The same from one forward pass of the model."""
    found = []
    for context, own in some:
        rows = exact([*context, *own], MODULES)[len(context) - 1 : -1]
        total = sum(row[token] for row, token in zip(rows, own, strict=True))
        found.append((total, rows.argmax(axis=1).tolist() == own))
    return found


def check(found, wanted):
    for (total, greedy), (own, own_greedy) in zip(found, wanted, strict=True):
        assert total == pytest.approx(own, abs=10 * ATOL) and greedy is own_greedy


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_likelihoods_are_those_of_the_model(ask, stack, max_tokens):
    some = tasks()
    prompts = [context + own for context, own in some]
    response = ask(prompt=prompts, max_tokens=max_tokens)
    assert response.status_code == 200, response.text
    answer, wanted = response.json(), direct(some)
    assert len({greedy for _, greedy in wanted}) == 2
    check(likelihoods(answer, some, max_tokens), wanted)
    assert answer["usage"]["completion_tokens"] == max_tokens * len(some)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for choice, tokens in zip(answer["choices"], prompts, strict=True):
        text = "".join(LETTERS[id_] for id_ in [*tokens, *alone(tuple(tokens))[:max_tokens]])
        ended = choice["finish_reason"] == "stop"  # the toy's eos has a letter, which is left out
        assert choice["text"] == (text[:-1] if ended else text)
        columns = choice["logprobs"]
        assert "".join(columns["tokens"]) == text
        assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
        assert columns["text_offset"] == list(range(len(text)))
    stack.assert_empty()


def test_continuations_are_ranked_as_the_model_ranks_them(stack):
    """A multiple-choice question; the numbers are those of the plain model."""
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 5, n).tolist() for n in (1, 4, 11)]
    rows = [[*context, a, b] for context in contexts for a in range(5) for b in range(2)]
    lengths = [len(row) - 2 for row in rows]
    with httpx2.Client(base_url=f"http://127.0.0.1:{stack.port}", timeout=120) as client:
        found = read_scores(post(client, "/v1/completions", scoring("toy", rows)), lengths)
    check(found, direct([(row[:n], row[n:]) for row, n in zip(rows, lengths, strict=True)]))
    assert any(greedy for _, greedy in found)


def test_a_shifted_row_is_seen(ask, monkeypatch):
    right = runner.prefill_rows

    def prefill_rows(*args):
        rows = right(*args)
        return dataclasses.replace(rows, targets=None if rows.targets is None else rows.token_ids)

    monkeypatch.setattr(runner, "prefill_rows", prefill_rows)
    some = tasks()
    response = ask(prompt=[context + own for context, own in some], max_tokens=1)
    with pytest.raises(AssertionError):
        check(likelihoods(response.json(), some, 1), direct(some))


def test_a_stream_brings_the_same(ask):
    """Of every answer to a prompt: they are scored one by one."""
    body = dict(prompt=[0, 1, 2, 3, 4] * 6, max_tokens=5, n=2, logprobs=3, ignore_eos=True)
    whole = ask(**body).json()["choices"]
    lines = ask(**body, stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index, choice in enumerate(whole):
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[0]["logprobs"]["token_logprobs"][0] is None
        for name, column in choice["logprobs"].items():
            joined = [entry for piece in pieces for entry in piece["logprobs"][name]]
            if name == "token_logprobs":
                assert joined[1:] == pytest.approx(column[1:], abs=ATOL)
            elif name != "top_logprobs":
                assert joined == column
    assert len(whole[0]["logprobs"]["tokens"]) == 35


def test_a_server_without_the_option_says_which(ask, stack):
    """It still puts a prompt in front of its answer."""
    used = stack.engines[0]._runner
    buckets = used.buckets
    try:
        used.buckets = dataclasses.replace(buckets, scored=False)
        refused = ask(prompt=[[1, 2, 3]], max_tokens=1)
        assert refused.status_code == 400
        assert "--prompt-logprobs" in refused.json()["error"]["message"]
        for most in (0, 2):
            body = dict(prompt=[3, 2, 3], max_tokens=most, logprobs=None, ignore_eos=True)
            said = [3, 2, 3, *alone((3, 2, 3))[:most]]
            text = ask(**body).json()["choices"][0]["text"]
            assert text == "".join(LETTERS[id_] for id_ in said)
    finally:
        used.buckets = buckets
