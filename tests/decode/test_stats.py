"""The acceptance metrics, each under its own name."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode.stats import AcceptanceStats
from tests.oracles import enumeration as enum


def test_stats_name_each_metric():
    stats = AcceptanceStats()
    stats.update(np.array([1, 2, 4, 4]), drafted=3, emitted=np.array([1, 2, 4, 2]))
    assert (stats.steps, stats.drafted, stats.accepted, stats.emitted) == (4, 12, 7, 9)
    assert stats.accepted_per_drafted == 7 / 12
    assert stats.mean_accepted_length == 1 + 7 / 4
    assert stats.emitted_per_step == 9 / 4
    assert stats.per_position == [3 / 4, 2 / 4, 2 / 4]
    assert stats.conditional == [3 / 4, 2 / 3, 2 / 2]
    assert all(type(x) is int for x in (stats.steps, stats.accepted, *stats.accepted_at))


def test_stats_with_mixed_depths_idle_rows_and_merge():
    a, b = AcceptanceStats(), AcceptanceStats()
    a.update(
        jnp.array([3, 1, 0]), drafted=np.array([2, 0, 5]), active=np.array([True, True, False])
    )
    assert (a.steps, a.drafted, a.accepted) == (2, 2, 2)
    assert a.per_position == [1, 1] and a.conditional == [1, 1]
    b.update(np.array([1, 2]), drafted=1)
    a.merge(b)
    assert a.per_position == [2 / 3, 1] and a.conditional == [2 / 3, 1] and a.steps == 4
    assert math.isnan(AcceptanceStats().accepted_per_drafted)


@pytest.mark.parametrize("alpha,want", [(0.51, [1.51, 1.77, 1.90]), (0.85, [1.85, 2.57, 3.19])])
def test_conditional_rates_give_the_mean_length(alpha, want):
    """E[length] = 1 + sum_k prod alpha: the table of the specification, from counts of that law."""
    for m, length in enumerate(want, 1):
        law = enum.length_law(np.full((1, m), alpha), "rejection")[0]
        counts = np.repeat(np.arange(1, m + 2), np.round(law * 100_000).astype(int))
        stats = AcceptanceStats()
        stats.update(counts, drafted=m)
        assert stats.mean_accepted_length == pytest.approx(length, abs=0.006)
        assert stats.conditional == pytest.approx([alpha] * m, abs=1e-3)


@pytest.mark.parametrize(
    "count,kwargs,match",
    [
        ([4], {"drafted": 2}, "1 to drafted"),
        ([0], {"drafted": 2}, "active"),
        ([2], {"drafted": 2, "emitted": [3]}, "truncate_at_stop"),
    ],
)
def test_stats_refuse_impossible_counts(count, kwargs, match):
    with pytest.raises(ValueError, match=match):
        AcceptanceStats().update(np.array(count), **kwargs)
