"""Log-probabilities of prompts: those of the plain model, whatever else the engine does."""

import dataclasses

import numpy as np
import pytest

from dskjax.decode.rules import RuleOptions
from serve import runner
from serve.attempts import copy_request
from serve.buckets import Buckets
from serve.programs import CompileCounter
from serve.request import FinishReason, Status
from tests.decode.plain import Ask, answer
from tests.serve.scores import check_scores
from tests.serve.stack import Answers, assert_empty, build, make_request, small, toy_model, until

MODULES = 1
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 18, 32, 33, 40)
"""Around the pages of 4 and the chunks of 4, 8 and 16 tokens."""


def prompt(length, seed=0):
    return np.random.default_rng((seed, length)).integers(0, 5, length).tolist()


WAYS = [True, pytest.param(False, marks=pytest.mark.full)]


make_buckets = Buckets.make


def one_shape(**options):
    """Prompt rows of four sequences only."""
    return dataclasses.replace(make_buckets(**options), chunk_shapes=((4, options["chunk"]),))


@pytest.fixture(scope="module", params=WAYS, ids=["mixed", "in turn"])
def served(request):
    """(engine, its answers), with so few pages that requests give way to others. Prompt rows share
    programs with decoding rows, or not. Those that do come in one shape: they take long to compile.
    """
    answers = Answers()
    config = small(
        mixed=request.param,
        chunk=8 if request.param else 16,
        drafts=1,
        pages=24,
        prompt_logprobs=True,
        rules=("strict",),
        accept=RuleOptions(name="strict"),
    )
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(Buckets, "make", one_shape)
        engine = build(toy_model(MODULES), config, answers)
    engine.start()
    yield engine, answers
    engine.stop()


def serve(served, requests):
    """Submits all and waits for their ends."""
    engine, answers = served
    for request in requests:
        engine.submit(request)
    answers.wait(request.id for request in requests)
    assert_empty(engine)
    return answers


@pytest.mark.parametrize("best", [0, 3])
def test_every_token_of_a_prompt_is_scored(served, best):
    """Chunk after chunk, beside others that decode, and beside unscored prompts in one launch."""
    name = f"all-{best}"
    scored = [
        make_request(f"{name}-{n}", prompt(n), 6, salt=name, prompt_logprobs=best, logprobs=2)
        for n in LENGTHS
    ]
    others = [
        make_request(f"{name}-{n}-plain", prompt(n, 1), 16, salt=name, ignore_eos=True)
        for n in LENGTHS
    ]
    mixed = [request for pair in zip(others, scored, strict=True) for request in pair]
    answers = serve(served, mixed)
    for request, length in zip(scored, LENGTHS, strict=True):
        check_scores(answers.prompt_logprobs[request.id], prompt(length), best, MODULES)
        said = answer(Ask(prompt=tuple(prompt(length)), max_tokens=6, stop_ids=(1,)), MODULES)
        assert answers.text(request.id) == said
        assert len(answers.logprobs[request.id]) == len(said)
    for request, length in zip(others, LENGTHS, strict=True):
        assert request.id not in answers.prompt_logprobs
        ask = Ask(prompt=tuple(prompt(length, 1)), max_tokens=16)
        assert answers.text(request.id) == answer(ask, MODULES)


def test_the_prefix_cache_swallows_no_row(served):
    tokens = prompt(37, 2)
    hits = []
    for n, best in enumerate((None, 2, None)):
        asked = make_request(f"cache-{n}", tokens, 3, salt="cache", prompt_logprobs=best)
        answers = serve(served, [asked])
        hits.append(asked.hit)
    assert hits[0] == hits[1] == 0 and hits[2] > 0
    check_scores(answers.prompt_logprobs["cache-1"], tokens, 2, MODULES)


def test_what_a_scored_prompt_computed_is_found_by_others(served):
    first = make_request("found-0", prompt(30, 3), 2, salt="found", prompt_logprobs=0)
    second = make_request("found-1", prompt(30, 3), 2, salt="found")
    serve(served, [first])
    answers = serve(served, [second])
    assert first.hit == 0 and second.hit > 0
    assert answers.text("found-0") == answers.text("found-1")


def test_a_request_that_gave_way_is_scored_once(served):
    """In the middle of its prompt, or while it decodes."""
    engine, _ = served
    before = engine.scheduler.stats().preemptions
    asked = [
        make_request(
            f"way-{n}",
            prompt(20 + n, 4),
            24,
            priority=n % 3,
            salt=f"way-{n}",
            ignore_eos=True,
            prompt_logprobs=3,
        )
        for n in range(16)
    ]
    answers = serve(served, asked)
    assert engine.scheduler.stats().preemptions > before
    assert max(request.admissions for request in asked) > 1
    for n, request in enumerate(asked):
        check_scores(answers.prompt_logprobs[request.id], prompt(20 + n, 4), 3, MODULES)
        ask = Ask(prompt=tuple(prompt(20 + n, 4)), max_tokens=24)
        assert answers.text(request.id) == answer(ask, MODULES)


def test_a_request_without_new_tokens_ends_with_its_prompt(served):
    asked = [
        make_request(f"none-{n}", prompt(n, 5), 0, salt="none", prompt_logprobs=3) for n in LENGTHS
    ]
    answers = serve(served, asked)
    for request, length in zip(asked, LENGTHS, strict=True):
        end = answers.ends[request.id]
        assert (end.tokens, end.finish, end.logprobs) == ([], FinishReason.LENGTH, None)
        check_scores(answers.prompt_logprobs[request.id], prompt(length, 5), 3, MODULES)
    answers = serve(served, [make_request("nothing", prompt(9), 0)])
    assert answers.text("nothing") == [] and "nothing" not in answers.prompt_logprobs


def test_a_scored_request_can_be_given_up_in_the_middle(served):
    engine, answers = served
    ids = [f"gone-{n}" for n in range(12)]
    for n, id in enumerate(ids):
        asked = make_request(id, prompt(40, n), n % 2, salt="gone", prompt_logprobs=1)
        engine.submit(asked)
        until(lambda asked=asked: asked.status is not Status.WAITING)
        engine.abort(id)
    serve(served, [make_request("last", prompt(40, 20), 0, salt="gone", prompt_logprobs=1)])
    check_scores(answers.prompt_logprobs["last"], prompt(40, 20), 1, MODULES)


def test_nothing_compiles_after_the_warm_up(served):
    """Programs that score, beside every number of decoding rows and chunks of every shape."""
    rng = np.random.default_rng(6)
    asked = []
    for n in range(40):
        best = (None, 0, 20)[n % 3]
        tokens = rng.integers(0, 5, int(rng.integers(1, 45))).tolist()
        most = int(rng.integers(best is None, 12))
        asked.append(make_request(f"load-{n}", tokens, most, prompt_logprobs=best))
    counter = CompileCounter()
    serve(served, asked)
    assert counter.count == 0


def test_a_server_without_the_option_refuses(served):
    engine, _ = served
    buckets = engine._runner.buckets
    try:
        engine._runner.buckets = dataclasses.replace(buckets, scored=False)
        with pytest.raises(ValueError, match=r"without --prompt-logprobs: .*echo with logprobs"):
            engine.validate(make_request("bad", prompt(5), prompt_logprobs=1))
        engine.validate(make_request("good", prompt(5), 0))
    finally:
        engine._runner.buckets = buckets
    engine.validate(make_request("good", prompt(5), prompt_logprobs=1))


def test_the_check_sees_a_row_too_early(served, monkeypatch):
    right = runner.prefill_rows

    def prefill_rows(*args):
        rows = right(*args)
        return dataclasses.replace(
            rows, targets=rows.targets if rows.targets is None else rows.token_ids
        )

    tokens = prompt(18, 7)
    monkeypatch.setattr(runner, "prefill_rows", prefill_rows)
    answers = serve(served, [make_request("early", tokens, 0, prompt_logprobs=2)])
    with pytest.raises(AssertionError):
        check_scores(answers.prompt_logprobs["early"], tokens, 2, MODULES)


def test_what_a_client_was_told_is_not_asked_for_again():
    """By the copies of a request that are made when an engine fails, or only receives."""
    request = make_request("a", prompt(5), prompt_logprobs=2, logprobs=1)
    assert copy_request(request, "a#0").scored
    assert not copy_request(request, "a#0", scored=False).scored
    request.tokens.append(3)
    copy = copy_request(request, "a#1")
    assert copy.sampling.prompt_logprobs is None and copy.sampling.logprobs == 1
    assert copy.tokens == request.tokens and copy.emitted == 1
