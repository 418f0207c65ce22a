"""Arrivals, lengths and workloads: laws, seeds, limits."""

import numpy as np
import pytest

from serve.bench.arrivals import offsets
from serve.bench.lengths import TAIL, Lengths
from serve.bench.workload import DrawnPrompts, RealPrompts

TEXT = tuple(range(1000, 3000))


def test_constant_arrivals_are_evenly_spaced():
    assert offsets("constant", 4.0, 5, seed=0).tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_gaps_are_exponential():
    times = offsets("poisson", 4.0, 20_001, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and len(times) == 20_001 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.25)  # exactly the rate, for few requests too
    assert offsets("poisson", 2.0, 5, seed=3)[-1] == pytest.approx(2.0)
    assert offsets("poisson", 2.0, 1, seed=3).tolist() == [0.0]
    assert gaps.std() == pytest.approx(0.25, rel=0.03)
    assert (gaps > 0.25).mean() == pytest.approx(np.exp(-1), abs=0.02)
    assert np.array_equal(times, offsets("poisson", 4.0, 20_001, seed=1))
    assert not np.array_equal(times, offsets("poisson", 4.0, 20_001, seed=2))


@pytest.mark.parametrize(("rate", "count"), [(0.0, 1), (-1.0, 1), (float("inf"), 1), (1.0, 0)])
def test_arrivals_refuse_what_has_no_meaning(rate, count):
    with pytest.raises(ValueError, match="must be"):
        offsets("poisson", rate, count, seed=0)


@pytest.mark.parametrize(("mean", "most"), [(3500.0, 16_000), (1200.0, 32_000), (8.0, 512)])
def test_lengths_have_their_mean_and_reach_their_maximum(mean, most):
    drawn = Lengths(mean=mean, most=most).draw(300_000, seed=0)
    assert drawn.mean() == pytest.approx(mean, rel=0.04)
    assert drawn.min() >= 1 and drawn.max() == most
    assert (drawn == most).mean() * TAIL == pytest.approx(1, abs=0.4)


def test_equal_mean_and_maximum_are_a_fixed_length():
    assert set(Lengths(mean=7.0, most=7).draw(100, seed=3).tolist()) == {7}


def test_scaled_lengths_keep_their_shape():
    law = Lengths(mean=3500.0, most=16_000)
    assert law.scaled(0.01) == Lengths(mean=35.0, most=160)
    assert law.scaled(0.01).sigma == pytest.approx(law.sigma)


@pytest.mark.parametrize(("mean", "most"), [(0.5, 10), (11.0, 10), (1.0, 10_000)])
def test_lengths_that_no_law_has(mean, most):
    with pytest.raises(ValueError, match="length"):
        Lengths(mean=mean, most=most)


def drawn(**changes):
    fields = dict(
        ids=TEXT,
        front=(0,),
        inputs=Lengths(mean=50.0, most=200),
        outputs=Lengths(mean=20.0, most=100),
        limit=256,
    )
    return DrawnPrompts(**(fields | changes))


def test_drawn_prompts_are_stretches_of_the_text_after_bos():
    jobs = drawn().jobs(300, seed=5)
    lengths = [len(job["prompt"]) for job in jobs]
    assert max(lengths) <= 200 and 40 < np.mean(lengths) < 60
    for job in jobs:
        first, *rest = job["prompt"]
        assert first == 0 and rest == list(TEXT[rest[0] - 1000 :][: len(rest)]) if rest else True
        assert job["ignore_eos"] and 1 <= job["max_tokens"] <= 100
        assert 0 <= job["seed"] < 2**31
    assert len({job["seed"] for job in jobs}) == 300
    assert jobs == drawn().jobs(300, seed=5)
    assert jobs[0]["prompt"] != drawn().jobs(300, seed=6)[0]["prompt"]


def test_drawn_requests_fit_into_the_server():
    jobs = drawn(limit=90).jobs(2000, seed=0)
    sums = [len(job["prompt"]) + job["max_tokens"] for job in jobs]
    assert max(sums) == 90 and min(job["max_tokens"] for job in jobs) >= 1


def test_drawn_requests_that_are_mostly_too_long_are_refused():
    with pytest.raises(ValueError, match="takes 60 together: lower the means, or --scale"):
        drawn(limit=60)


def test_a_short_text_is_refused():
    with pytest.raises(ValueError, match="199 tokens and the longest prompt 200"):
        drawn(ids=TEXT[:199])
    drawn(ids=TEXT[:200])


def test_real_prompts_are_all_taken_before_one_comes_again():
    prompts = [{"prompt": str(n)} for n in range(10)]
    jobs = RealPrompts(prompts=prompts, max_tokens=9).jobs(25, seed=1)
    texts = [job["prompt"] for job in jobs]
    assert len(texts) == 25
    assert set(texts[:10]) == set(texts[10:20]) == {str(n) for n in range(10)}
    assert texts[:10] != [str(n) for n in range(10)]
    assert {job["max_tokens"] for job in jobs} == {9}
    assert len({job["seed"] for job in jobs}) == 25
