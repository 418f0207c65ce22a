"""`mla_decode`: every implementation on every case, poisoned, against a float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.latent_cache import gather_rows
from pallas_kernels.mla_decode import api, cases
from pallas_kernels.softmax import masked_softmax
from pallas_kernels.testing import call
from tests.kernels.mla_decode_suite import CASES, IMPLS, answer, check, recipe, run


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(lambda **_: answer(impl, case), case, tolerance=recipe(impl, case))


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_matches_oracle_on_real_shapes(impl, case):
    check(run(impl), case, tolerance=recipe(impl, case))


SIX = {"min_size": 6, "max_size": 6}


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=15)
@given(
    lens=st.lists(st.integers(0, 36), **SIX),
    queries=st.lists(st.integers(0, 6), **SIX).filter(lambda q: sum(q) < 25),
    seed=st.integers(0, 3),
)
def test_any_ragged_batch(impl, lens, queries, seed):
    if impl == "mosaic_sm90" and jax.default_backend() == "cpu":
        pytest.skip("interpreting takes seconds an example")
    sizes = {"lens": tuple(lens), "queries": tuple(queries), "padding": 24 - sum(queries)}
    check(run(impl), dataclasses.replace(CASES["mixed"], **sizes), seed)  # its static shape


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_keys_are_exactly_empty(impl):
    case = CASES["hopper ragged" if impl == "mosaic_sm90" else "mixed with gaps"]
    out, lse = answer(impl, case)
    empty = np.isneginf(np.asarray(lse))
    assert empty.any() and (np.asarray(out)[empty] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_unused_memory_does_not_change_a_bit(impl):
    case = CASES["hopper ragged" if impl == "mosaic_sm90" else "mixed"]
    clean = run(impl)(**case.make(0, poison=False))
    used = sum(case.queries)
    for a, b in zip(clean, answer(impl, case), strict=True):
        np.testing.assert_array_equal(a[:used], b[:used])


# ------------------------------------------------------------------ planted bugs


def _args(**changes):
    """An op that gets some of its arguments wrong: changes are functions of all arguments."""
    op = run("reference")
    return lambda **a: op(**a | {name: change(a) for name, change in changes.items()})


def _out(change):
    op = run("reference")
    return lambda **a: change(*op(**a), a)


def _masked_by_product(**a):
    """Clears what a query may not see with a product, as if 0 * NaN were 0."""
    plan = api.plan_mla_decode(a["cached_lens"], a["query_starts"], a["q_latent"].shape[0])
    latent, rope = gather_rows(a["cache"], a["layer"], a["page_table"])
    seen_ts = jnp.arange(latent.shape[1]) < plan.visible[:, None]
    latent, rope = (x[plan.token_seq] * seen_ts[..., None] for x in (latent, rope))
    scores = jnp.einsum("thc,tsc->ths", a["q_latent"], latent)
    scores += jnp.einsum("thp,tsp->ths", a["q_rope"], rope)
    probs, lse = masked_softmax(scores * a["scale"], seen_ts[:, None])
    return jnp.einsum("ths,tsc->thc", probs, latent), lse


def _one_row_off(step):
    def visible(a):
        plan = api.plan_mla_decode(a["cached_lens"], a["query_starts"], a["q_latent"].shape[0])
        real = jnp.arange(plan.visible.shape[0]) < a["query_starts"][-1]
        return dataclasses.replace(plan, visible=jnp.where(real, plan.visible + step, 0))

    return visible


def _padded(a):
    return a["page_table"].shape[1] * a["cache"].page_size


BUGS = {
    "last page dropped": _args(cached_lens=lambda a: a["cached_lens"] // 4 * 4),
    "sees one row ahead": _args(plan=_one_row_off(1)),
    "misses its own row": _args(plan=_one_row_off(-1)),
    "not causal among new rows": _args(
        plan=lambda a: dataclasses.replace(
            p := api.plan_mla_decode(a["cached_lens"], a["query_starts"], a["q_latent"].shape[0]),
            visible=jnp.where(p.visible > 0, a["cached_lens"][p.token_seq], p.visible),
        )
    ),
    "pages in order": _args(page_table=lambda a: jnp.sort(a["page_table"], axis=1)),
    "wrong layer": _args(
        cache=lambda a: jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), a["cache"])
    ),
    "scale of the latent width": _args(scale=lambda a: 40**-0.5),
    "rope ignored": _args(q_rope=lambda a: a["q_rope"] * 0),
    "masked by a product": lambda **a: call(_masked_by_product, a),
    "whole table visible": _args(cached_lens=lambda a: a["cached_lens"] * 0 + _padded(a)),
    "lse in base 2": _out(lambda out, lse, a: (out, lse / np.log(2))),
    "empty rows are NaN": _out(
        lambda out, lse, a: (jnp.where(jnp.isneginf(lse)[..., None], jnp.nan, out), lse)
    ),
    "empty rows have lse 0": _out(lambda out, lse, a: (out, jnp.where(jnp.isneginf(lse), 0, lse))),
    "heads swapped": _out(lambda out, lse, a: (out[:, ::-1], lse)),
    "out in another dtype": _out(lambda out, lse, a: (out.astype(jnp.float16), lse)),
    "one element off": _out(lambda out, lse, a: (out.at[3, 1, 5].add(1e-3), lse)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    check(run("reference"), CASES["mixed"])
    with pytest.raises(AssertionError):
        check(BUGS[bug], CASES["mixed"])
