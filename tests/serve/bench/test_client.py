"""One request and a server's own words, against real sockets: our HTTP layer and a peer's."""

import asyncio
import socket

import pytest

from serve.api import OverloadedError
from serve.bench.client import Client, connect
from serve.bench.server import ask_counters, ask_info, sum_counters, tokenize
from serve.http import create_app
from serve.request import FinishReason
from tests.serve.bench.peer import ANSWER, METRICS, USAGE, chat, peer
from tests.serve.http.fake import TINY, listening

TURN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT = {"prompt": "hello there", "max_tokens": 4, "seed": 2}


def visit(app, work):
    """What `work(http)` returns, with `app` on a port."""

    async def main(port):
        async with connect(f"http://127.0.0.1:{port}/v1", timeout=5.0) as http:
            return await work(http)

    with listening(app) as port:
        return asyncio.run(main(port))


def ask(app, job, **options):
    return visit(app, lambda http: Client(http, "org/fake", options).send(job))


def test_a_completion(service):
    service.delay = 0.02
    answer = ask(create_app(service), TEXT, temperature=0.5, accept="block", speculate=1)
    assert answer.ok and answer.finish == "stop"
    assert answer.text == "blue grün 青 black "
    assert (answer.completion_tokens, answer.cached_tokens) == (4, 2)
    assert answer.prompt_tokens == len(TINY.encode("hello there", bos=True))
    assert (answer.drafted, answer.accepted, answer.lossless) == (8, 4, True)
    assert len(answer.pieces) == 4 and 0.02 <= answer.ttft <= answer.e2e and answer.e2e >= 0.08
    assert answer.tpot == pytest.approx(sum(answer.gaps) / 3)
    _, options, _ = service.calls[0]
    assert (options.sampling.temperature, options.drafts) == (0.5, 1)
    assert options.accept.name == "block" and options.stop.max_tokens == 4


def test_a_chat_counts_reasoning_as_text(service):
    job = {**TURN, "seed": 0, "chat_template_kwargs": {"thinking": True}}
    answer = ask(create_app(service), job)
    assert answer.ok and answer.text == "red green blue grün "
    assert len(answer.pieces) == 4


def test_a_peer_without_extras():
    answer = ask(peer(), TURN)
    assert answer.ok and answer.text == "hm so" and answer.finish == "stop"
    assert len(answer.pieces) == 3  # the chunk with the role alone is no token
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 4)
    assert answer.drafted is None and answer.lossless is None


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        (ANSWER[:-1], "broken"),
        ([*ANSWER[:3], "[DONE]"], "malformed"),
        ([*ANSWER[:4], "[DONE]"], "malformed"),
        (["{", "[DONE]"], "malformed"),
        (["3", "[DONE]"], "malformed"),
        ([{"nothing": 1}], "malformed"),
        ([chat({"content": "a"}), {"error": {"message": "no memory"}}], "error event"),
        ([USAGE, "[DONE]"], "malformed"),
    ],
)
def test_an_answer_that_does_not_end_well(events, kind):
    answer = ask(peer(events=events), TURN)
    assert answer.error == kind and answer.message
    assert not answer.ok


def test_refusals_have_their_status_and_reason(service):
    service.refusal = OverloadedError("the queue is full", 1.0)
    answer = ask(create_app(service), TEXT)
    assert answer.error == "HTTP 429" and "queue is full" in answer.message
    assert ask(create_app(service), {**TEXT, "prompt": [10**9]}).error == "HTTP 400"


def test_a_failure_amid_a_stream(service):
    service.finish = (FinishReason.ERROR, "the engine broke")
    answer = ask(create_app(service), TEXT)
    assert answer.error == "error event" and answer.message == "the engine broke"


def test_nobody_there_and_nobody_answering():
    async def main(port):
        async with connect(f"http://127.0.0.1:{port}", timeout=0.2) as http:
            return await Client(http, "m").send(TEXT)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert asyncio.run(main(port)).error == "timeout"
    assert asyncio.run(main(port)).error == "refused"


def test_what_is_no_address():
    async def main():
        async with connect("http://[::1"):
            raise AssertionError

    with pytest.raises(ValueError, match="no address"):
        asyncio.run(main())


def test_info_of_our_server(service):
    info = visit(create_app(service), ask_info)
    assert (info.model, info.max_model_len) == ("org/fake", 256)
    assert "version" in info.version


def test_info_of_a_peer():
    info = visit(peer(), ask_info)
    assert (info.model, info.max_model_len, dict(info.version)) == ("a", None, {})
    assert visit(peer(), lambda http: ask_info(http, model="b")).model == "b"
    with pytest.raises(ValueError, match="no model 'c'; it has a, b"):
        visit(peer(), lambda http: ask_info(http, model="c"))
    with pytest.raises(ValueError, match="lists no model"):
        visit(peer(models=()), ask_info)


def test_counters_are_summed_over_engines():
    expected = {"spec_decode_num_drafts": 5.0, "spec_decode_num_draft_tokens": 10.0}
    assert sum_counters(METRICS) == expected
    assert visit(peer(), ask_counters) == expected
    assert visit(peer(metrics="# nothing\n"), ask_counters) is None


def test_tokens_by_the_server(service):
    text = "a sentence, and another.\n" * 3
    front, ids = visit(create_app(service), lambda http: tokenize(http, "org/fake", text))
    assert list(ids) == TINY.encode(text, bos=False)
    assert list(front) == [TINY.bos_id]
    with pytest.raises(ValueError, match="give --tokenizer"):
        visit(peer(), lambda http: tokenize(http, "a", text))
