"""Rates within a limit, by hand."""

import pytest

from benchmarks.goodput import NOTHING, Requests, apart, together

WHAT = Requests(prompt=1000, output=100)


def row(batch, milliseconds, tokens=2.0, **more):
    return {"batch": batch, "tokens": tokens, "step_us": {"median": 1e3 * milliseconds}} | more


DECODE = [row(10, 20), row(40, 50)]  # 10 and 25 ms a token


def test_apart_the_slower_half_sets_the_pace():
    fast = [{"prefilled_per_second_per_gpu": 1e9}]
    assert apart(DECODE, fast, WHAT, 20) == (0.5 * 1000, 10, 10)
    assert apart(DECODE, fast, WHAT, 25) == (0.5 * 1600, 40, 25)
    slow = [{"prefilled_per_second_per_gpu": 4000.0}]  # 4 prompts, so 400 tokens
    assert apart(DECODE, slow, WHAT, 25).output == 0.5 * 400
    assert apart(DECODE, slow, WHAT, 25, share=0.75).output == pytest.approx(0.75 * 400)
    assert apart(DECODE, fast, WHAT, 9) == NOTHING


def test_together_a_part_of_the_steps_carries_prompts():
    # 20 new tokens a step are a fifth of an answer, so 200 prompt tokens: 0.4 of a chunk.
    mixed = [row(10, 70, chunk=500), row(40, 100, chunk=500)]
    found = together(DECODE, mixed, WHAT, 30)
    assert found.batch == 10
    assert found.tpot_ms == pytest.approx((0.4 * 70 + 0.6 * 20) / 2)
    assert found.output == pytest.approx(20 / 0.040)


def test_together_prompts_must_keep_up():
    # 80 new tokens a step ask for 800 prompt tokens, and a step has 500 at the most.
    assert together([row(40, 50)], [row(40, 100, chunk=500)], WHAT, 1e3) == NOTHING
    assert together([row(40, 50)], [row(10, 100, chunk=500)], WHAT, 1e3) == NOTHING
