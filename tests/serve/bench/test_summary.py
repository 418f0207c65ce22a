"""Figures of answers, on numbers that can be checked by hand."""

import pytest

from serve.bench.answer import Answer
from serve.bench.summary import Objectives, percentile, summarize
from tests.serve.bench.virtual import answer

GOAL = Objectives(ttft=2.0, tpot=0.05, percentile=90.0)


def fast(start=0.0, **rest):
    return answer(start, start, start + 1.0, start + 1.4, **rest)  # 11 tokens: TPOT 40 ms


def test_times_of_an_answer_count_from_when_it_was_due():
    late = answer(10.0, 10.5, 11.0, 13.0, tokens=5)
    assert (late.ttft, late.e2e, late.tpot, late.gaps) == (1.0, 3.0, 0.5, [2.0])
    assert answer(0.0, 0.0, 1.0, 1.0, tokens=1).tpot is None


def test_percentiles_are_nearest_rank():
    values = [float(v) for v in range(1, 11)]
    assert [percentile(values, p) for p in (10, 50, 90, 91, 99, 100)] == [1, 5, 9, 10, 10, 10]
    assert percentile([3.0], 50) == 3.0
    assert percentile([], 50) is None


def test_objectives_are_kept_by_enough_requests_each():
    good, bad = fast(), answer(0.0, 0.0, 2.5, 2.6)
    assert GOAL.met([good] * 9 + [bad])
    assert not GOAL.met([good] * 8 + [bad] * 2)
    slow = answer(0.0, 0.0, 1.0, 1.6)
    assert GOAL.met([good] * 8 + [bad, slow])  # each objective is missed once
    assert not GOAL.met([good] * 8 + [slow] * 2)
    failed = Answer(due=0.0, sent=0.0, error="HTTP 503")
    assert not GOAL.met([good] * 8 + [failed] * 2)
    assert not GOAL.met([])


def test_one_token_has_no_tpot_to_miss():
    assert GOAL.good(answer(0.0, 0.0, 1.0, 1.0, tokens=1))


def test_a_percentile_of_100_forgives_nothing():
    assert not Objectives(percentile=100.0).met([fast()] * 999 + [answer(0.0, 0.0, 2.5, 2.6)])
    assert Objectives(percentile=100.0).met([fast()] * 999)


@pytest.mark.parametrize("fields", [{"ttft": 0}, {"tpot": -1}, {"percentile": 0}])
def test_objectives_out_of_range(fields):
    with pytest.raises(ValueError, match="must be"):
        Objectives(**{name: float(value) for name, value in fields.items()})


def test_summary():
    answers = [
        fast(0.0, prompt_tokens=100, cached_tokens=64, drafted=10, accepted=4, lossless=True),
        fast(2.6, prompt_tokens=60, drafted=10, accepted=8, lossless=True),
        answer(1.0, 1.25, 3.5, 3.6, prompt_tokens=40, tokens=3),  # too late
        Answer(due=1.0, sent=1.0, error="HTTP 503"),
        Answer(due=1.0, sent=1.0, error="HTTP 503"),
    ]
    counters = {"spec_decode_num_drafts": 8.0, "spec_decode_num_accepted_tokens": 12.0}
    found = summarize(answers, GOAL, counters)
    assert (found["requests"], found["completed"]) == (5, 3)
    assert found["errors"] == {"HTTP 503": 2}
    assert found["seconds"] == pytest.approx(4.0)
    assert found["qpm"] == pytest.approx(45)
    assert found["tokens_per_s"] == pytest.approx(
        {"input": 50, "input_cached": 16, "output": 6.25, "total": 56.25}
    )
    assert found["goodput"] == pytest.approx(
        {"requests_per_s": 0.5, "share": 0.4, "objectives_met": False}
    )
    assert found["ttft_s"] == pytest.approx({"mean": 4.5 / 3, "p50": 1.0, "p90": 2.5, "p99": 2.5})
    assert found["tpot_s"]["p99"] == pytest.approx(0.05)
    assert found["client_lag_s"] == 0.25
    assert found["speculation"] == {
        "drafted": 20,
        "accepted": 12,
        "accepted_per_drafted": 0.6,
        "mean_accepted_length": 2.5,
        "lossless": True,
    }


def test_drafts_come_from_counters_where_answers_do_not_tell():
    counters = {
        "spec_decode_num_drafts": 10.0,
        "spec_decode_num_draft_tokens": 30.0,
        "spec_decode_num_accepted_tokens": 15.0,
    }
    found = summarize([fast()], GOAL, counters)["speculation"]
    assert (found["accepted_per_drafted"], found["mean_accepted_length"]) == (0.5, 2.5)
    assert found["lossless"] is None
    assert summarize([fast()], GOAL)["speculation"] is None
    told = summarize([fast(drafted=0, accepted=0)], GOAL)["speculation"]
    assert told["accepted_per_drafted"] is None and told["mean_accepted_length"] is None


def test_all_failed():
    found = summarize([Answer(due=0.0, sent=0.0, error="refused")], GOAL)
    assert found["completed"] == 0 and found["ttft_s"]["p50"] is None
    with pytest.raises(ValueError, match="no answers"):
        summarize([], GOAL)
