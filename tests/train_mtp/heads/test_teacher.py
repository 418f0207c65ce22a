"""The trunk's likeliest tokens."""

import jax
import numpy as np
import pytest

from train_mtp.heads.teacher import largest


@pytest.mark.parametrize(("size", "count"), [(500, 9), (512, 9), (40, 9), (16, 16)])
def test_the_largest_are_those_of_a_full_sort(size, count):
    rng = np.random.default_rng(0)
    for values in (
        rng.standard_normal((3, 5, size)),
        rng.poisson(1.0, (3, 50, size)),  # full of ties, which go to the lowest index
        np.full((3, 5, size), -1e9),
    ):
        rows = jax.numpy.asarray(values, "float32")
        got, want = largest(rows, count), jax.lax.top_k(rows, count)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
        assert got[1].dtype == np.int32
