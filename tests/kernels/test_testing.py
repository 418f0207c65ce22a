"""The tools of the other tests: comparison that goes red, inputs that are what they claim."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.act_quant import cases as act_quant
from pallas_kernels.grouped_matmul import cases as grouped_matmul
from pallas_kernels.matmul import cases as matmul
from pallas_kernels.mla_decode import cases as mla_decode
from pallas_kernels.mla_prefill import cases as mla_prefill
from pallas_kernels.router import cases as router
from pallas_kernels.testing import Tolerance, assert_close, assert_equal, generate

OPS = [act_quant, grouped_matmul, matmul, mla_decode, mla_prefill, router]
TOL = Tolerance(abs=1e-3, rel=1e-3, cosine=1e-6, reason="a test")
WANT = np.array([[1.0, -2, 0], [np.inf, -np.inf, 1000]])


def with_value(index, value):
    got = WANT.copy()
    got[index] = value
    return got


@pytest.mark.parametrize(
    ("index", "value"),
    [((0, 0), 1.0019), ((0, 2), -9e-4), ((1, 2), 1000.9), ((1, 2), 999.1), ((0, 0), 1)],
)
def test_close_within_abs_and_rel(index, value):
    assert_close(with_value(index, value), WANT, TOL)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ((0, 0), 1.0021, r"1 of 6 elements are wrong; first at \(0, 0\) got 1.0021, expected 1.0"),
        ((0, 2), 2e-3, r"first at \(0, 2\)"),
        ((1, 2), 1001.1, r"first at \(1, 2\)"),
        ((0, 1), np.nan, r"first at \(0, 1\) got nan"),
        ((0, 1), -np.inf, r"got -inf, expected -2"),
        ((1, 0), 1e30, r"got 1e\+30, expected inf"),
        ((1, 0), -np.inf, r"got -inf, expected inf"),
        ((1, 1), np.nan, r"got nan, expected -inf"),
    ],
)
def test_close_reports_the_coordinate(index, value, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(with_value(index, value), WANT, TOL)


def test_close_sees_errors_that_add_up():
    """Each element within 1.9e-3, all of them in one direction."""
    want = np.ones(1000)
    with pytest.raises(AssertionError, match="cosine"):
        assert_close(want * 1.0019, want, TOL)


def test_close_reports_first_and_worst():
    got = np.zeros(5)
    got[1], got[3] = 0.1, 7
    with pytest.raises(AssertionError, match=r"2 of 5 .* first at \(1,\) .* worst at \(3,\)"):
        assert_close(got, np.zeros(5), TOL)


def test_close_refuses_other_shapes_and_nan_expectations():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones((1, 3)), np.ones(3), TOL)  # no broadcasting
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(np.ones(2), np.array([1, np.nan]), TOL)


def test_close_takes_every_float_dtype():
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float16):
        assert_close(jnp.asarray([1.5, -2], dtype), np.array([1.5, -2]), TOL)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (np.int32([1, 2]), np.int32([1, 3])),
        (np.int32([1, 2]), np.int64([1, 2])),
        (np.int32([[1, 2]]), np.int32([1, 2])),
        (np.float32([0.0]), np.float32([-0.0])),
        (np.float32([1.0]), np.nextafter(np.float32([1.0]), np.float32(2))),
        (jnp.ones(1, jnp.bfloat16), 2 * jnp.ones(1, jnp.bfloat16)),
        (jnp.ones(1, jnp.float8_e4m3fn), -jnp.ones(1, jnp.float8_e4m3fn)),
    ],
)
def test_equal_sees(got, want):
    assert_equal(got, got)
    with pytest.raises(AssertionError):
        assert_equal(got, want)


def test_equal_reports_the_coordinate():
    with pytest.raises(AssertionError, match=r"1 of 4 .* first at \(1, 0\) got 7, expected 3"):
        assert_equal(np.int32([[1, 2], [7, 4]]), np.int32([[1, 2], [3, 4]]))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.split(".")[1])
def test_cases_are_named_once_and_tagged(op):
    names = [case.name for case in op.CASES]
    assert len(set(names)) == len(names)
    assert all(set(case.tags) <= {"ci", "full", "bench"} and case.tags for case in op.CASES)
    assert op.CI and op.BENCH and {str(case) for case in op.CI} <= set(names)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.split(".")[1])
def test_the_same_seed_gives_the_same_inputs(op):
    case = op.CI[1]
    first, again, other = (case.make(seed) for seed in (0, 0, 1))
    arrays = [name for name, value in first.items() if hasattr(value, "dtype")]
    for name in arrays:
        assert_equal(first[name], again[name])
    assert any((np.asarray(first[n]) != np.asarray(other[n])).any() for n in arrays)


@pytest.mark.parametrize("poison", [False, True])
def test_page_tables_use_no_page_twice(poison):
    rng, lens = np.random.default_rng(0), (9, 0, 4, 17)
    table = generate.page_table(rng, lens, 4, width=6, num_pages=12, poison=poison)
    used = [table[row, : -(-length // 4)] for row, length in enumerate(lens)]
    ids = np.concatenate(used)
    assert len(set(ids)) == len(ids) == 9 and ids.min() >= 0 and ids.max() < 12
    assert (np.diff(ids) < 0).any(), "pages are not in order"
    rest = np.concatenate([table[row, len(u) :] for row, u in enumerate(used)])
    assert set(rest) == (set(generate.GARBAGE_PAGES) if poison else {0})
    slots = generate.used_slots(table, lens, 4, 12)
    assert slots.sum() == sum(lens)


def test_page_tables_refuse_what_does_not_fit():
    for kwargs in ({"width": 2, "num_pages": 9}, {"width": 3, "num_pages": 2}):
        with pytest.raises(ValueError, match="need"):
            generate.page_table(np.random.default_rng(0), (9,), 4, poison=False, **kwargs)


@pytest.mark.parametrize("load", ["even", "skewed", "one", "few", "none"])
def test_loads_of_experts(load):
    sizes = generate.group_sizes(np.random.default_rng(0), 96, 16, load)
    assert sizes.sum() == (0 if load == "none" else 96)
    if load == "few":
        assert (sizes > 0).sum() == 4
    if load == "one":
        assert sizes.max() == 96
    if load == "skewed":
        assert sizes.max() > 18 > sizes.min()
