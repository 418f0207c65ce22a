"""Dispatch and combine against their definition, row by row."""

import dataclasses
import functools
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.expert_parallel import by_expert, combine, dispatch, layout, weigh
from pallas_kernels import act_quant, peer_exchange
from pallas_kernels.quant import QTensor
from tests.parallel.common import AXIS, choices, expected_rows, needs_8, on_ranks

RANKS, ROWS, TOP_K, PER_RANK, WIDTH = 4, 6, 3, 3, 8
CASES = {
    "mixed": {"idle": 0.3},
    "full": {},
    "one hot expert set": {"hot": True},
    "nobody has work": {"idle": 1.0},
}
TRANSPORTS = ("all_to_all", "peer")


@pytest.fixture(autouse=True)
def poisoned_puts(monkeypatch):
    """Puts bring garbage where no row came."""
    monkeypatch.setattr(sys.modules["dskjax.expert_parallel.message"], "peer_exchange", poisoned)


def poisoned(rows, counts, axis, *, impl):
    got, arrived = peer_exchange(rows, counts, axis, impl=impl)
    is_there = jnp.arange(rows.shape[1]) < arrived[:, None]
    garbage = 0xFF if rows.dtype == jnp.uint8 else jnp.nan
    return jnp.where(is_there[..., None], got, jnp.array(garbage, rows.dtype)), arrived


def make(case: str, seed: int = 0, width: int = WIDTH):
    rng = np.random.default_rng(seed)
    rows = RANKS * ROWS
    experts = choices(rng, (rows, TOP_K), RANKS * PER_RANK, **CASES[case])
    if case == "mixed":
        experts[ROWS : 2 * ROWS] = -1  # an idle rank
    x = rng.standard_normal((rows, width)).astype(np.float32)
    weights = rng.random((rows, TOP_K)).astype(np.float32)
    return x, experts, weights


@functools.cache
def sent(payload: str = "native", transport: str = "all_to_all"):
    options = {"payload": payload, "transport": transport}

    def run(x, experts, weights):
        got = dispatch(x, experts, weights, axis=AXIS, per_rank=PER_RANK, **options)
        return got.x, got.experts, got.weights, got.layout.counts

    return on_ranks(run, RANKS)


def by_rank(a):
    return np.asarray(a).reshape(RANKS, -1, *a.shape[1:])


@needs_8
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", CASES)
def test_every_row_arrives_once_at_each_rank_that_owns_its_experts(case, transport):
    x, experts, weights = make(case)
    run = sent(transport=transport)
    got_x, got_experts, got_weights, counts = map(by_rank, run(x, experts, weights))
    for me in range(RANKS):
        rows = expected_rows(by_rank(experts), PER_RANK, me)
        slots = {source: 0 for source in range(RANKS)}
        filled = np.zeros(RANKS * ROWS, bool)
        for source, row in rows:
            at, flat = source * ROWS + slots[source], source * ROWS + row
            slots[source] += 1
            filled[at] = True
            np.testing.assert_array_equal(got_x[me, at], x[flat])
            np.testing.assert_array_equal(got_weights[me, at], weights[flat])
            mine = experts[flat] // PER_RANK == me
            wanted = np.where(mine & (experts[flat] >= 0), experts[flat] - me * PER_RANK, -1)
            np.testing.assert_array_equal(got_experts[me, at], wanted)
        assert (got_experts[me, ~filled] == -1).all() and not got_x[me, ~filled].any()
        assert not got_weights[me, ~filled].any()
        for source in range(RANKS):
            assert counts[source, me] == slots[source]


@needs_8
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_fp8_payload_is_what_act_quant_makes_of_the_row(transport):
    x, experts, weights = make("mixed", width=256)
    got, ids, *_ = sent("fp8", transport)(x, experts, weights)
    native, native_ids, *_ = sent()(x, experts, weights)
    assert isinstance(got, QTensor) and got.values.dtype == jnp.float8_e4m3fn
    want = act_quant(native)
    taken = (np.asarray(ids) >= 0).any(axis=1)
    np.testing.assert_array_equal(ids, native_ids)
    for name in ("values", "scales"):
        found, wanted = (np.asarray(getattr(q, name))[taken] for q in (got, want))
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))


def expert_of(x, expert):
    """Stands for an expert: cheap, different for each, exact in fp32 sums."""
    return x * (2.0 + expert)


def definition(x, experts, weights):
    """sum_k w_k expert_k(x), float64."""
    out = np.zeros(x.shape)
    for k in range(TOP_K):
        named = experts[:, k] >= 0
        scaled = expert_of(x, experts[:, k, None]) * weights[:, k, None]
        out += np.where(named[:, None], scaled, 0)
    return out


def throughput(x, experts, weights, *, transport="all_to_all"):
    got = dispatch(x, experts, weights, axis=AXIS, per_rank=PER_RANK, transport=transport)
    first = jax.lax.axis_index(AXIS) * PER_RANK
    each = expert_of(got.x[:, None], (first + got.experts)[:, :, None])
    named = (got.experts >= 0)[:, :, None]
    y = jnp.where(named, each * got.weights[:, :, None], 0).sum(axis=1)
    empty = ~named.any(axis=1)
    return combine(jnp.where(empty, jnp.nan, y), got, axis=AXIS)


def low_latency(x, experts, weights, *, transport="all_to_all"):
    got = dispatch(x, experts, weights, axis=AXIS, per_rank=PER_RANK, transport=transport)
    slots = by_expert(got, per_rank=PER_RANK, dtype=x.dtype)
    first = jax.lax.axis_index(AXIS) * PER_RANK
    y = expert_of(slots.x, (first + jnp.arange(PER_RANK))[:, None, None])
    used = jnp.arange(y.shape[1])[None, :] < slots.counts[:, None]
    return combine(weigh(jnp.where(used[:, :, None], y, jnp.nan), slots, got), got, axis=AXIS)


MODES = {"throughput": throughput, "low_latency": low_latency}


@functools.cache
def round_trip(mode: str, transport: str = "all_to_all"):
    return on_ranks(functools.partial(MODES[mode], transport=transport), RANKS)


@needs_8
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_applied_once_and_empty_slots_count_for_nothing(mode, case, transport):
    x, experts, weights = make(case)
    got = round_trip(mode, transport)(x, experts, weights)
    np.testing.assert_allclose(got, definition(x, experts, weights), rtol=1e-6, atol=1e-6)


@needs_8
@pytest.mark.parametrize("mode", MODES)
@hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.2, 0.9)))
@hypothesis.settings(max_examples=20)
def test_any_routing(mode, seed, idle):
    x, _, weights = make("full", seed)
    experts = choices(np.random.default_rng(seed), (RANKS * ROWS, TOP_K), 12, idle=idle)
    got = round_trip(mode)(x, experts, weights)
    np.testing.assert_allclose(got, definition(x, experts, weights), rtol=1e-6, atol=1e-6)


@needs_8
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_reach_rows_and_weights(transport):
    x, experts, weights = make("mixed")
    pull = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(x, weights):
        out = round_trip("throughput", transport)(x, experts, weights)
        return (jnp.where(jnp.isnan(out), 0, out) * pull).sum()

    dx, dw = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(weights))
    factor = np.where(experts >= 0, expert_of(1.0, experts), 0)
    np.testing.assert_allclose(dx, pull * (factor * weights).sum(1)[:, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, factor * (pull * x).sum(1)[:, None], rtol=1e-5, atol=1e-5)


@needs_8
def test_rows_that_do_not_fit_are_not_put():
    """The count that travels is of the rows that do."""
    x, experts, weights = make("full")

    def run(x, experts, weights):
        args = {"axis": AXIS, "per_rank": PER_RANK, "capacity": 1, "transport": "peer"}
        got = dispatch(x, experts, weights, **args)
        return got.counts, got.x

    counts, got = on_ranks(run, RANKS)(x, experts, weights)
    assert np.asarray(counts).max() == 1
    assert np.isfinite(np.asarray(got)).all()


def test_layout_leaves_out_what_does_not_fit_and_says_so():
    experts = jnp.array([[0, 1], [0, 2], [0, -1], [3, 2]])
    found = layout(experts, per_rank=2, ranks=2, capacity=2)
    np.testing.assert_array_equal(found.source, [[0, 1], [1, 3]])
    np.testing.assert_array_equal(found.place, [[0, 4], [1, 2], [4, 4], [3, 4]])
    np.testing.assert_array_equal(found.counts, [3, 2])


def counted_twice(experts, **sizes):
    """A second choice that goes to the same rank brings the row back a second time."""
    found = layout(experts, **sizes)
    first = found.place.min(axis=1, keepdims=True)
    place = jnp.where(found.place == found.source.size, first, found.place)
    return dataclasses.replace(found, place=place)


def wrong_slot(experts, **sizes):
    found = layout(experts, **sizes)
    return dataclasses.replace(found, place=found.place ^ 1)


def next_rank(experts, **sizes):
    return layout((experts + PER_RANK) % (RANKS * PER_RANK), **sizes)


@needs_8
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bug", [counted_twice, wrong_slot, next_rank])
def test_suite_sees(bug, mode, monkeypatch):
    monkeypatch.setattr(sys.modules["dskjax.expert_parallel.dispatch"], "layout", bug)
    x, experts, weights = make("full")
    got = on_ranks(MODES[mode], RANKS)(x, experts, weights)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, definition(x, experts, weights), rtol=1e-3, atol=1e-3)
