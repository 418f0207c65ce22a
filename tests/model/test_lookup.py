"""Rows of a table by id: their gradient, whose sums have one order on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.lookup import added_in_order, lookup, places


def added(grad: np.ndarray, ids: np.ndarray, rows: int) -> np.ndarray:
    total = np.zeros((rows, grad.shape[1]))
    for row, index in zip(grad, ids, strict=True):
        if 0 <= index < rows:
            total[index] += row
    return total


@given(
    ids=st.lists(st.integers(-2, 7), min_size=1, max_size=40),
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_sums_by_id(ids: list[int], rows: int, seed: int):
    """Whole numbers, so that any order gives the same: ids once, often, never, and outside."""
    grad = np.random.default_rng(seed).integers(-8, 9, (len(ids), 3)).astype(np.float32)
    got = added_in_order(jnp.asarray(grad), jnp.asarray(ids), rows)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, added(grad, np.asarray(ids), rows))
    # Threads that wrote to the same place would do so in any order.
    where = np.asarray(places(jnp.sort(jnp.asarray(ids)), rows))
    assert len(set(where.tolist())) == len(ids)
    assert set(where[where < rows]) == {i for i in ids if 0 <= i < rows}


def test_bf16_is_added_in_fp32():
    """1000 places of one id, whose bf16 sums would stop at 256."""
    got = added_in_order(jnp.ones((1000, 2), jnp.bfloat16), jnp.full(1000, 1), 3)
    np.testing.assert_array_equal(got[:, 0], [0, 1000, 0])


def test_nothing_leaks_from_one_id_into_another():
    """NaN and infinity stay with their id: a running sum less the one before would spread them."""
    grad = jnp.asarray([[1.0], [jnp.inf], [2.0], [jnp.nan], [3.0]])
    got = added_in_order(grad, jnp.asarray([0, 1, 2, 3, 4]), 5)
    np.testing.assert_array_equal(got, grad)


@pytest.mark.parametrize("spread", [False, True])
def test_gradient_of_a_table(spread: bool):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    ids = jnp.asarray([[4, 0, 0], [2, 4, 4]])
    weight = rng.integers(-4, 5, (2, 3, 4)).astype(np.float32)
    grad = jax.grad(lambda t: jnp.vdot(lookup(t, ids, spread), weight))(table)
    np.testing.assert_array_equal(grad, added(weight.reshape(-1, 4), np.ravel(ids), 5))


def test_gpus_add_in_order():
    """Of the program for a GPU, the only scatter writes each place once."""
    table, ids = jnp.zeros((8, 4)), jnp.zeros(16, jnp.int32)
    gradient = jax.jit(jax.grad(lambda t, i: jnp.sum(lookup(t, i))))
    text = gradient.trace(table, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('"stablehlo.scatter"') == text.count("unique_indices = true") == 1
    spread = jax.jit(jax.grad(lambda t, i: jnp.sum(lookup(t, i, True))))
    text = spread.trace(table, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.sort" not in text
