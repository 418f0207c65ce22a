"""An echoed prompt: its text in front of the answer's, its log-probabilities in front of them."""

import pytest

from serve.plan import TokenEvent, TokenLogprob
from serve.request import FinishReason, SamplingOptions
from serve.text import AnswerText
from tests.serve.text_fakes import TINY, ids, options, request

BOS = TINY.bos_id
assert BOS is not None


def test_an_echoed_prompt_comes_first_and_is_no_answer():
    req = request(prompt=(BOS, *ids("ab ")))
    answer = AnswerText(TINY, options(echo=True, stop=("ab", "x")), req)
    first, second = (answer.push(TokenEvent(req, ids(text))) for text in ("c", "dx"))
    assert first is not None and second is not None
    assert (first.text, second.text, second.stop_reason) == ("ab c", "d", "x")
    assert first.token_ids == ids("c") and first.logprobs is None
    assert second.usage is not None
    assert len(req.tokens) == second.usage.prompt_tokens
    assert second.usage.completion_tokens == len(ids("c") + ids("dx"))


def test_an_echo_shows_special_tokens_only_if_the_answer_does():
    for shown in (False, True):
        req = request(prompt=(BOS, *ids("a")))
        answer = AnswerText(TINY, options(echo=True, echo_special=shown), req)
        piece = answer.push(TokenEvent(req, ids("b")))
        assert piece is not None and piece.text == TINY.decode([BOS]) * shown + "ab"


def test_a_character_that_begins_in_the_prompt_ends_in_the_answer():
    first, *rest = ids("😀")
    assert rest
    req = request(prompt=(*ids("a"), first))
    answer = AnswerText(TINY, options(echo=True), req)
    pieces = [answer.push(TokenEvent(req, [token])) for token in [*rest, *ids("b")]]
    assert "".join(piece.text for piece in pieces if piece) == "a😀b"
    assert pieces[0] is not None and pieces[0].text[:1] == "a"


@pytest.mark.parametrize("best", [0, 1])
def test_log_probabilities_of_prompt_and_answer_stand_in_one_list(best):
    a, b, c = (ids(letter)[0] for letter in "abc")
    sampling = SamplingOptions(logprobs=1, prompt_logprobs=best)
    req = request(prompt=(BOS, a, b))
    answer = AnswerText(TINY, options(echo=True, sampling=sampling), req)
    told = [TokenLogprob(-0.5, [(c, -0.25)]), TokenLogprob(-1.5, [(b, -1.5)])]
    own = [TokenLogprob(-2.0, [(a, -1.0)])]
    piece = answer.push(TokenEvent(req, [c], None, own, prompt_logprobs=told))
    assert piece is not None and piece.logprobs is not None
    found = [(entry.chosen.token, entry.chosen.logprob) for entry in piece.logprobs]
    assert found == [(TINY.decode([BOS]), None), ("a", -0.5), ("b", -1.5), ("c", -2.0)]
    tops = [[(top.token, top.logprob) for top in entry.top] for entry in piece.logprobs]
    assert tops == [[], [("c", -0.25)][:best], [("b", -1.5)][:best], [("a", -1.0)]]
    later = answer.push(TokenEvent(req, [c], None, own))
    assert later is not None and later.text == "c" and len(later.logprobs or ()) == 1


def test_an_echo_alone_is_the_prompt():
    req = request(prompt=(BOS, *ids("ab")))
    opts = options(echo=True, max_tokens=0, sampling=SamplingOptions(prompt_logprobs=0))
    answer = AnswerText(TINY, opts, req)
    told = [TokenLogprob(-1.0, [])] * len(ids("ab"))
    piece = answer.push(TokenEvent(req, [], FinishReason.LENGTH, prompt_logprobs=told))
    assert piece is not None and piece.usage is not None and answer.ended
    assert (piece.text, piece.finish) == ("ab", FinishReason.LENGTH)
    assert len(piece.logprobs or ()) == 1 + len(told) and piece.usage.completion_tokens == 0
