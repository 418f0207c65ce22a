"""The tuner finds the peak of an overlap curve, from noisy and late measurements."""

import collections

import numpy as np
import pytest

from dskjax.decode.tuner import DraftTemperature

PEAKS = np.array([0.7, 1.0, 1.5])


def climb(tuner, steps, peaks=PEAKS, *, noise=0.1, lag=0, seed=0, absent=0.0):
    """Runs the tuner on overlap 0.7 - 0.6 ln(c / peak)^2; returns the factors it stood on."""
    rng = np.random.default_rng(seed)
    pending, stood = collections.deque(), []
    for _ in range(steps):
        pending.append(tuner.scale)
        if len(pending) > lag:
            used = pending.popleft()
            overlaps = 0.7 - 0.6 * np.log(used / peaks) ** 2
            overlaps += noise * rng.standard_normal(len(peaks))
            overlaps[rng.random(len(peaks)) < absent] = np.nan
            tuner.update(overlaps, used)
        stood.append(tuner.best)
    return np.array(stood)


@pytest.mark.parametrize(
    "world", [{}, {"lag": 3}, {"absent": 0.4}, {"seed": 1}, {"noise": 0.0}], ids=str
)
def test_finds_the_peak_of_each_depth(world):
    stood = climb(DraftTemperature(3), 8000, **world)
    late = np.exp(np.log(stood[4000:]).mean(axis=0))
    np.testing.assert_allclose(late, PEAKS, rtol=0.12)
    assert (np.abs(np.log(stood[4000:] / PEAKS)) < np.log(1.15) * 2.6).all()


def test_follows_a_peak_that_moves():
    tuner = DraftTemperature(3)
    climb(tuner, 4000)
    late = climb(tuner, 9000, PEAKS[::-1])[6000:]
    np.testing.assert_allclose(np.exp(np.log(late).mean(axis=0)), PEAKS[::-1], rtol=0.15)


def test_stays_in_bounds_and_repeats_itself():
    one = climb(DraftTemperature(3, low=0.8, high=1.2), 4000)
    two = climb(DraftTemperature(3, low=0.8, high=1.2), 4000)
    np.testing.assert_array_equal(one, two)
    assert one.min() >= 0.8 and one.max() <= 1.2
    assert one[-1, 0] < 1 < one[-1, 2]


def test_tries_both_neighbours_and_half_the_time_the_best():
    tuner = DraftTemperature(2, ratio=1.25)
    tried = []
    for _ in range(8):
        assert tuner.scale.dtype == np.float32 and tuner.scale.shape == (2,)
        tried.append(float(tuner.scale[0]))
        tuner.update([np.nan, np.nan], tuner.scale)
    assert tried == pytest.approx([1, 1.25, 1, 0.8] * 2)
    assert tuner.best.tolist() == [1, 1]
    DraftTemperature(0).update([], [])


def test_refusals():
    tuner = DraftTemperature(2)
    with pytest.raises(ValueError, match="not a scale that this tuner gave out"):
        tuner.update([0.5, 0.5], [1.0, 1.07])
    with pytest.raises(ValueError, match="give 2 values"):
        tuner.update([0.5], [1.0])
    for bad in ({"ratio": 1.0}, {"low": 1.5}, {"high": 0.5}, {"rate": 0.0}, {"window": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            DraftTemperature(2, **bad)
