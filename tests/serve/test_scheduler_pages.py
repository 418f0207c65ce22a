"""Admission, growth, preemption, the end of a request and what it leaves in the cache."""

import pytest

from serve.request import FinishReason, SamplingOptions, Status
from serve.results import Results, token_logprobs
from tests.serve.fake import continuation
from tests.serve.harness import EOS, Harness, long_answer, make_config, make_request, prompt

# ---- admission, growth, preemption


def test_admission_keeps_a_reserve_for_what_runs():
    answers = {}
    for reserve in (0, 12):
        harness = Harness(make_config(num_pages=8, max_columns=8, reserve_tokens=reserve))
        tokens = long_answer(8, 20)
        harness.add("a", tokens, 20)
        harness.launch()
        harness.add("b", prompt(15, 5), 4)
        harness.launch()
        answers[reserve] = harness.scheduler.stats().waiting
        harness.drain()
        harness.check_drained()
    assert answers == {0: 0, 12: 1}


def test_a_hit_counts_as_room():
    harness = Harness(make_config(num_pages=8, max_columns=8, reserve_tokens=0))
    shared = prompt(17)
    a = harness.add("a", [*shared, 50, 51], 6)
    while a.status is not Status.RUNNING or harness.launched:
        harness.step()
        if a.status is Status.RUNNING and len(harness.launched) == 1:
            break
    b = harness.add("b", [*shared, 52, 53], 6)
    harness.step()
    assert b.slot >= 0 and b.hit == 16  # 4 of its 5 pages are a's
    harness.drain()
    harness.check_drained()


def test_the_last_in_rank_gives_way_and_the_first_is_never_stopped():
    harness = Harness(make_config(num_pages=12, max_columns=12, reserve_tokens=0))
    tokens = [long_answer(4 + i, 30) for i in range(3)]
    requests = [harness.add(str(i), tokens[i], 30) for i in range(3)]
    harness.drain()
    harness.check_drained()
    assert harness.scheduler.stats().preemptions > 0
    assert requests[0].admissions == 1 and requests[2].admissions > 1
    ends = list(harness.ends)
    assert ends[0] == "0" and len(ends) == 3


def test_priority_decides_who_gives_way():
    harness = Harness(make_config(num_pages=10, max_columns=10, reserve_tokens=0))
    old = harness.add("old", long_answer(4, 30), 30, priority=1)
    new = harness.add("new", long_answer(5, 30), 30, priority=0)
    harness.drain()
    assert old.admissions > 1 and new.admissions == 1


def scored_prompt_gives_way():
    """A prompt whose scores are wanted has run in part when the other request takes its pages."""
    config = make_config(num_pages=10, max_columns=10, reserve_tokens=0, max_prefill_tokens=4)
    harness = Harness(config)
    harness.add("first", long_answer(4, 30), 30)
    sampling = SamplingOptions(prompt_logprobs=0)
    scored = harness.add("scored", prompt(29, 5), 4, sampling=sampling)
    harness.drain()
    harness.check_drained()
    return scored


def test_scores_of_a_prompt_that_runs_again_are_told_once():
    assert scored_prompt_gives_way().admissions > 1


def test_the_harness_sees_scores_that_are_told_twice(monkeypatch):
    def keep(self, result):
        for chunk, found in result.prompt_logprobs:
            if chunk.request.status is not Status.FINISHED:
                known = self._residents.entries[chunk.request.id].prompt_logprobs
                known += token_logprobs(found, chunk.request.sampling.prompt_logprobs)

    monkeypatch.setattr(Results, "_keep_prompt_logprobs", keep)
    with pytest.raises(AssertionError, match=r"\d scores"):
        scored_prompt_gives_way()


def test_results_launched_before_a_preemption_count():
    harness = Harness(make_config(num_pages=10, max_columns=10, reserve_tokens=0))
    harness.add("a", long_answer(4, 30), 30)
    b = harness.add("b", long_answer(5, 30), 30)
    while True:
        harness.launch()
        if harness.scheduler.stats().preemptions:
            break
        if len(harness.launched) == 2:
            harness.fetch()
    assert b.status is Status.WAITING and b.slot >= 0  # a step is under way
    before = b.emitted
    while b.slot >= 0:
        harness.fetch()
    assert b.emitted == before + 1 and b.slot == -1
    harness.drain()
    harness.check_drained()


def test_published_pages_make_a_resume_cheap():
    harness = Harness(make_config(num_pages=16, max_columns=16, reserve_tokens=0))
    tokens = [long_answer(10 + i, 40) for i in range(2)]
    for i in range(2):
        harness.add(str(i), tokens[i], 40)
    harness.drain()
    known = sum(len(t) for t in tokens)
    assert harness.scheduler.stats().preemptions > 0
    assert harness.runner.computed < known + 40


# ---- the end of a request


def test_slot_and_pages_are_given_back_after_the_last_launched_step():
    harness = Harness(make_config(num_slots=1))
    request = harness.add("a", prompt(6), 1)
    harness.launch()
    harness.launch()
    assert len(harness.launched) == 2
    harness.scheduler.abort("a")
    taken = harness.config.num_pages - harness.blocks.available
    assert taken == 2 and request.status is Status.FINISHED
    harness.fetch()
    assert harness.blocks.available == harness.config.num_pages - taken
    assert not harness.scheduler.idle
    harness.fetch()
    harness.check_drained()


def test_an_ended_row_is_launched_at_most_once_more():
    harness = Harness(make_config(drafts=3, lookahead=3, tail=2))
    for i in range(12):
        harness.add(str(i), prompt(3 + i, i), 9)
    harness.drain()
    assert set(harness.wasted.values()) == {1}


def test_a_row_that_must_have_ended_is_not_launched():
    harness = Harness(make_config())
    harness.run("a", long_answer(5, 4), 4)
    assert harness.wasted == {} and sum(bool(p.requests) for p in harness.plans) == 4


def test_ends_tell_stop_from_length():
    harness = Harness(make_config())
    tokens = long_answer(5, 6)
    answer, _ = continuation(tokens, make_request("x", tokens, 6).stop, EOS)
    harness.run("length", tokens, 6)
    harness.run("stop", tokens, 6, stop_token_ids=(answer[3],))
    length, stop = harness.ends["length"], harness.ends["stop"]
    assert (length.finish, length.stop_token) == (FinishReason.LENGTH, None)
    assert (stop.finish, stop.stop_token) == (FinishReason.STOP, answer[3])
    for first in range(1000):  # one that ends with an eos
        found, reason = continuation(prompt(5, first), make_request("x", [1], 40).stop, EOS)
        if reason is FinishReason.STOP:
            break
    harness.run("eos", prompt(5, first), 40)
    harness.run("ignored", prompt(5, first), len(found), ignore_eos=True)
    assert harness.ends["eos"].stop_token == EOS[0]
    assert harness.ends["ignored"].finish is FinishReason.LENGTH


def test_finish_ends_without_further_events():
    harness = Harness(make_config())
    request = harness.add("a", long_answer(5, 30), 30)
    while request.emitted < 6:
        harness.step()
    assert harness.launched
    assert harness.scheduler.finish("a", FinishReason.STOP, keep_tokens=4) is request
    assert request.emitted == 4
    while harness.launched:
        assert harness.fetch() == []
    assert harness.scheduler.stats().mean_output == 4
    assert harness.scheduler.finish("a", FinishReason.STOP) is None
    assert harness.scheduler.abort("a") is None
    harness.check_drained()


def test_times_and_draft_counts_are_written_into_the_request():
    harness = Harness(make_config(drafts=3, lookahead=3, tail=2))
    request = harness.run("a", long_answer(5, 20), 20)
    assert request.first_scheduled < request.first_token < request.last_token
    assert 0 < request.accepted < request.drafted


def test_logprobs_are_delivered_to_those_who_asked():
    harness = Harness(make_config(drafts=2, lookahead=2, tail=1))
    seen = {"a": [], "b": []}
    harness.add("a", long_answer(5, 9), 9, sampling=SamplingOptions(logprobs=2))
    harness.add("b", long_answer(6, 9), 9)
    take = harness._take
    harness._take = lambda event: (seen[event.request.id].append(event), take(event))
    harness.drain()
    for event in seen["a"]:
        assert len(event.logprobs) == len(event.tokens)
        assert [top[0][0] for _, top in event.logprobs] == event.tokens
        assert all(len(top) == 2 for _, top in event.logprobs)
    assert all(event.logprobs is None for event in seen["b"])


# ---- the prefix cache of a running engine


def test_pages_of_an_answer_are_shared_once_their_rows_are_final():
    harness = Harness(make_config(drafts=3, lookahead=3, tail=2), acceptance=0.5)
    first = harness.run("a", long_answer(7, 20), 20)
    known = first.tokens
    second = harness.add("b", [*known, 3, 4, 5], 5)
    harness.launch()
    # The modules do not run over the tokens of the last step, so its rows are not final.
    assert second.hit in (20, 24) and second.hit <= len(known) - 3
    harness.drain()
    harness.check_drained()


def test_salts_do_not_share():
    harness = Harness(make_config())
    harness.run("a", prompt(12), salt="x")
    assert harness.run("b", prompt(12), salt="y").hit == 0
    assert harness.run("c", prompt(12), salt="x").hit == 8
