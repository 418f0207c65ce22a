"""`grouped_matmul`: every implementation on every case, poisoned, against a float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import cases, xla
from pallas_kernels.testing import assert_close, call, jit
from tests.kernels.grouped_matmul_suite import CASES, IMPLS, check, op_of, oracle, run
from tests.tolerances import GRADIENT, OP

FLOAT_IMPLS = [impl for impl in IMPLS if impl != "mosaic_sm90"]
"""Those that take rows and weights that are not quantized."""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_matches_oracle_on_real_shapes(impl, case):
    check(run(impl), case)


@pytest.mark.parametrize("impl", FLOAT_IMPLS)
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 96), min_size=16, max_size=16), seed=st.integers(0, 3))
def test_any_group_sizes(impl, sizes, seed):
    case = CASES["even"]  # its static shape
    sizes = np.minimum(sizes, np.maximum(96 - np.cumsum([0, *sizes[:-1]]), 0))
    args = case.make(seed) | {"group_sizes": jnp.asarray(sizes, jnp.int32)}
    args["x"] = args["x"].at[sizes.sum() :].set(jnp.nan)
    assert_close(run(impl)(**args), oracle(**args), OP["float32"])


@pytest.mark.parametrize("impl", FLOAT_IMPLS)
def test_groups_around_the_capacity(impl):
    """The last group grows past 24 rows, the capacity of `xla`; some rows belong to no group."""
    for largest in range(22, 28):
        args = CASES["even"].make(0)
        args["group_sizes"] = jnp.zeros(16, jnp.int32).at[jnp.asarray([3, 15])].set([9, largest])
        assert_close(run(impl)(**args), oracle(**args), OP["float32"], f"{largest=}")


def test_a_group_over_capacity_takes_the_slow_path():
    check(lambda **a: call(_without_slow_path, a), CASES["even"])
    with pytest.raises(AssertionError):  # without it rows would be lost
        check(lambda **a: call(_without_slow_path, a), CASES["all on one expert"])


def _without_slow_path(x, w, group_sizes):
    x = jnp.where((jnp.arange(len(x)) < group_sizes.sum())[:, None], x, 0)
    starts = jnp.cumsum(group_sizes) - group_sizes
    return xla._by_capacity(x, w, group_sizes, starts, 24)


def test_contracted_sizes_must_agree():
    args = CASES["int4 ragged groups"].make(0)  # of arrays the type hook would complain first
    with pytest.raises(ValueError, match="K=329 but w has K=330"):
        grouped_matmul(**args | {"x": args["x"][:, :-1]})


# ------------------------------------------------------------------ gradients


def gradients(op, case):
    args = case.make(0)
    weight = case.rng(1).standard_normal((args["x"].shape[0], *case.lead))
    loss = lambda x, w: (op(x, w, args["group_sizes"]) * weight).sum()  # noqa: E731
    return jit(jax.grad(loss, argnums=(0, 1)))(args["x"], args["w"]), args, weight


@pytest.mark.parametrize("impl", FLOAT_IMPLS)
@pytest.mark.parametrize("name", ["skewed", "all on one expert", "padding"])
def test_gradients(impl, name):
    """Against the closed form: dx = dy w, dw = dy^T x within each group, 0 past the groups."""
    case = CASES[name]
    (dx, dw), args, dy = gradients(op_of(impl), case)
    x, w = np.float64(args["x"]), np.float64(args["w"])
    want_dx, want_dw, start = np.zeros_like(x), np.zeros_like(w), 0
    for e, size in enumerate(np.asarray(args["group_sizes"])):
        rows = slice(start, start + size)
        want_dx[rows] = np.einsum("mgn,gnk->mk", dy[rows], w[e])
        want_dw[e] = np.einsum("mgn,mk->gnk", dy[rows], x[rows])
        start += size
    assert_close(dx, want_dx, GRADIENT["float32"], "dx")
    assert_close(dw, want_dw, GRADIENT["float32"], "dw")


# ------------------------------------------------------------------ planted bugs


def _args(**changes):
    op = run("reference")
    return lambda **a: op(**a | {name: change(a) for name, change in changes.items()})


def _first_row_to_the_next_group(a):
    """One row is counted to the group after its own."""
    group = jnp.argmax(a["group_sizes"] > 0)
    return a["group_sizes"].at[group].add(-1).at[(group + 1) % 16].add(1)


BUGS = {
    "experts in another order": _args(w=lambda a: a["w"][::-1]),
    "a border one row off": _args(group_sizes=_first_row_to_the_next_group),
    "gate and up swapped": _args(w=lambda a: a["w"][:, ::-1]),
    "last row lost": lambda **a: run("reference")(**a).at[49].set(0),
    "padding not cleared": lambda **a: run("reference")(**a).at[-1].set(1e-6),
    "padding multiplied": lambda **a: run("reference")(**a) + a["x"].sum(-1)[:, None, None] * 0,
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    check(run("reference"), CASES["padding"])
    with pytest.raises(AssertionError):
        check(BUGS[bug], CASES["padding"])


@pytest.mark.parametrize("name", ["e4m3 ragged blocks", "int4 ragged groups"])
def test_suite_sees_wrong_scales(name):
    def broken(**a):
        w = a["w"]
        return run("reference")(**a | {"w": dataclasses.replace(w, scales=1 / w.scales)})

    check(run("reference"), CASES[name])
    with pytest.raises(AssertionError):
        check(broken, CASES[name])
