"""`mla_prefill`: every implementation on every case, poisoned, against a float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import MlaPrefillPlan, mla_prefill
from pallas_kernels.mla_prefill import api, cases, xla
from pallas_kernels.softmax import masked_softmax, merge
from pallas_kernels.testing import assert_close, call, distinct, jit
from tests.oracles import attention
from tests.tolerances import GRADIENT, OP

IMPLS = ["xla", "reference"]  # the others cannot return a log-sum-exp
OTHERS = [name for name in distinct(api.IMPLEMENTATIONS) if name not in IMPLS]
CASES = {case.name: case for case in cases.CASES}
INPUTS = ("q_nope", "q_rope", "k_nope", "k_rope", "v")


def run(impl):
    return lambda **args: call(mla_prefill, args | {"impl": impl})


@functools.cache
def expected(case, seed):
    """(arguments with poison, out, lse of the oracle)."""
    args = case.make(seed, poison=True)
    arrays = (np.asarray(args[name]) for name in INPUTS)
    return args, *attention.prefill(*arrays, *case.plan_arrays(seed), args["scale"])


def check(op, case, seed=0):
    args, want_out, want_lse = expected(case, seed)
    out, lse = op(**args)
    assert out.dtype == args["q_nope"].dtype and lse.dtype == jnp.float32
    assert_close(out, want_out, OP[case.dtype], "out")
    assert_close(lse, want_lse, OP[case.dtype], "lse")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", OTHERS)
@pytest.mark.parametrize("case", cases.CI + cases.FULL, ids=str)
def test_output_without_lse_matches_oracle(impl, case):
    args, want, _ = expected(case, 0)
    try:
        out, _ = run(impl)(**args, with_lse=False)
    except NotImplementedError as reason:
        assert case.dtype == "float32" or case.queries % 2, reason
        pytest.skip(str(reason))
    assert_close(out, want, OP[case.dtype], "out")


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_matches_oracle_on_real_shapes(impl, case):
    check(run(impl), case)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 7)), min_size=1, max_size=4).filter(
        lambda c: sum(n for _, n in c) <= 20 and sum(map(sum, c)) <= 40
    ),
    seed=st.integers(0, 3),
)
def test_any_chunks(impl, chunks, seed):
    case = dataclasses.replace(CASES["packed"], chunks=tuple(chunks))  # its static shape
    check(run(impl), case, seed)


@pytest.mark.parametrize("impl", IMPLS)
def test_prefix_and_chunk_merge_exactly(impl):
    """Cached prefix and new tokens may be attended to in two calls, and merged by their lse."""
    args, want_out, want_lse = expected(CASES["after prefixes"], 0)
    plan, first_new = args["plan"], jnp.asarray([7, 0, 1, 3])
    is_new = plan.key_pos >= first_new[plan.key_seq]
    parts = []
    for keep in (is_new, ~is_new):
        part = dataclasses.replace(plan, key_seq=jnp.where(keep, plan.key_seq, -1))
        parts += run(impl)(**args | {"plan": part})
    out, lse = merge(*parts)
    assert_close(out, want_out, OP["float32"], "out")
    assert_close(lse, want_lse, OP["float32"], "lse")


def test_merge_ignores_what_an_empty_side_holds():
    out, lse = jnp.ones((2, 3)), jnp.asarray([0.5, -jnp.inf])
    nothing = jnp.full((2, 3), jnp.nan), jnp.full(2, -jnp.inf)
    merged, merged_lse = merge(out, lse, *nothing)
    np.testing.assert_array_equal(merged, [[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(merged_lse, lse)


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_must_divide_the_flat_axes(rows):
    args = CASES["one token"].make(0)
    plan = dataclasses.replace(args["plan"], rows=rows)
    with pytest.raises(ValueError, match=f"plan.rows={rows}"):
        mla_prefill(**args | {"plan": plan})


# ------------------------------------------------------------------ gradients


@functools.cache
def reference_gradients(case):
    return gradients(functools.partial(mla_prefill, impl="reference"), case)


def gradients(op, case):
    """Gradients of <out, random> + <lse, random> in all five inputs; empty rows count nothing."""
    args = case.make(0)
    inputs = {name: args.pop(name) for name in INPUTS}
    rng = case.rng(1)
    weight_out = rng.standard_normal(inputs["q_nope"].shape[:2] + inputs["v"].shape[2:])
    weight_lse = rng.standard_normal(inputs["q_nope"].shape[:2])

    def loss(inputs):
        out, lse = op(**inputs, **args)
        return (out * weight_out).sum() + jnp.where(lse > -jnp.inf, lse * weight_lse, 0).sum()

    return jit(jax.grad(loss))(inputs)


def check_gradients(op, case):
    want = reference_gradients(case)
    for name, got in gradients(op, case).items():
        assert np.abs(want[name]).max() > 0.1
        assert_close(got, want[name], GRADIENT["float32"], name)


@pytest.mark.parametrize("block", [512, 10])
def test_xla_gradients_match_the_reference(block, monkeypatch):
    monkeypatch.setattr(xla, "QUERY_BLOCK", block)  # of 20 queries: one block, two blocks
    check_gradients(functools.partial(mla_prefill, impl="xla"), CASES["after prefixes"])


def test_reference_gradient_matches_finite_differences():
    case, step = CASES["after prefixes"], 1e-6
    grads = reference_gradients(case)
    args, plan = case.make(0), case.plan_arrays(0)
    rng = case.rng(1)
    weight_out = rng.standard_normal((*args["q_nope"].shape[:2], case.value))
    weight_lse = rng.standard_normal(args["q_nope"].shape[:2])
    inputs = {name: np.float64(args[name]) for name in INPUTS}

    def loss(inputs):
        out, lse = attention.prefill(*inputs.values(), *plan, args["scale"])
        return (out * weight_out).sum() + (np.where(lse > -np.inf, lse, 0) * weight_lse).sum()

    for name in INPUTS:
        direction = rng.standard_normal(inputs[name].shape)
        up, down = (loss(inputs | {name: inputs[name] + s * direction}) for s in (step, -step))
        want = (up - down) / (2 * step)
        got = (np.float64(grads[name]) * direction).sum()
        np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=name)


def test_gradient_suite_sees_a_stopped_gradient():
    def broken(**a):
        return mla_prefill(**a | {"k_rope": jax.lax.stop_gradient(a["k_rope"])}, impl="xla")

    with pytest.raises(AssertionError):
        check_gradients(broken, CASES["after prefixes"])


# ------------------------------------------------------------------ planted bugs


def _plan(**changes):
    """An op whose plan is wrong: changes are functions of the plan."""
    op = run("reference")

    def broken(**a):
        new = {name: change(a["plan"]) for name, change in changes.items()}
        return op(**a | {"plan": dataclasses.replace(a["plan"], **new)})

    return broken


def _inputs(**changes):
    op = run("reference")
    return lambda **a: op(**a | {name: change(a) for name, change in changes.items()})


def _unmasked_values(**a):
    """Clears values with probabilities alone, as if 0 * NaN were 0."""
    scores = jnp.einsum("thn,shn->hts", a["q_nope"], a["k_nope"])
    scores += jnp.einsum("thp,sp->hts", a["q_rope"], a["k_rope"])
    probs, lse = masked_softmax(scores * a["scale"], a["plan"].mask())
    return jnp.einsum("hts,shv->thv", probs, a["v"]), lse.T


BUGS = {
    "sees one key ahead": _plan(query_pos=lambda p: p.query_pos + 1),
    "misses its own key": _plan(query_pos=lambda p: p.query_pos - 1),
    "position within the chunk": _plan(
        query_pos=lambda p: p.query_pos - jnp.asarray([7, 0, 1, 3])[p.query_seq]
    ),
    "documents see each other": _plan(
        query_seq=lambda p: jnp.minimum(p.query_seq, 0), key_seq=lambda p: jnp.minimum(p.key_seq, 0)
    ),
    "keys taken in flat order": _plan(key_pos=lambda p: jnp.arange(p.key_pos.shape[0]) % 8),
    "padding is a document": _plan(
        query_seq=lambda p: jnp.where(p.query_seq < 0, 0, p.query_seq),
        key_seq=lambda p: jnp.where(p.key_seq < 0, 0, p.key_seq),
    ),
    "values masked by probabilities": lambda **a: call(_unmasked_values, a),
    "scale of the nope width": _inputs(scale=lambda a: 16**-0.5),
    "rope ignored": _inputs(q_rope=lambda a: a["q_rope"] * 0),
    "value heads swapped": _inputs(v=lambda a: a["v"][:, ::-1]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    check(run("reference"), CASES["after prefixes"])
    with pytest.raises(AssertionError):
        check(BUGS[bug], CASES["after prefixes"])


def test_a_plan_over_rows_keeps_sequences_apart():
    plan = MlaPrefillPlan(*(jnp.asarray([0, 0, 1, 1]), jnp.asarray([0, 1, 0, 1])) * 2, rows=2)
    np.testing.assert_array_equal(plan.mask(), np.tril(np.ones((2, 2, 2), bool)))
