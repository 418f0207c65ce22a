"""`expert_mlp`: every implementation and every number of rows against a float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import expert_mlp, swiglu
from pallas_kernels.expert_mlp import api, cases, xla
from pallas_kernels.testing import assert_close, assert_equal, call, distinct
from tests.kernels.expert_mlp_suite import CASES, check, op_of, run
from tests.tolerances import OP

IMPLS = [name for name in distinct(api.IMPLEMENTATIONS) if name != "mosaic_sm90"]
"""That one quantizes rows: see `test_mosaic_expert_mlp.py`."""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_weights_mean_what_they_meant(impl):
    case = CASES["packed"]
    before = dataclasses.replace(case, packed=False).make(0)
    assert_equal(run(impl)(**case.make(0)), run(impl)(**before))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_implementations_agree_whatever_the_routing(seed):
    for name in ("by pair", "few"):
        args = CASES[name].make(seed)
        assert_close(call(op_of("xla"), args), call(op_of("reference"), args), OP["float32"])


@pytest.mark.parametrize("name", ["by pair", "few", "few choices by pair"])
def test_gradients_agree(name):
    args = CASES[name].make(0)

    def grads(impl):
        def loss(x, gate_up, down, weights):
            out = expert_mlp(x, weights, args["experts"], gate_up, down, impl=impl)
            return jnp.sum(jnp.sin(out))

        parts = (args["x"], args["gate_up"], args["down"], args["weights"])
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*parts)

    for mine, want in zip(grads("xla"), grads("reference"), strict=True):
        assert_close(mine, want, OP["float32"])


def test_a_row_does_not_see_other_rows():
    args = CASES["few"].make(0)
    out = call(op_of("xla"), args)
    args["x"] = args["x"].at[3].set(jnp.nan)
    other = np.asarray(call(op_of("xla"), args))
    keep = np.arange(len(other)) != 3
    assert np.array_equal(np.asarray(out)[keep], other[keep])


MISTAKES = {
    "weights of the wrong expert": lambda args: args | {"weights": args["weights"][:, ::-1]},
    "expert off by one": lambda args: args | {"experts": args["experts"] ^ 1},
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
@pytest.mark.parametrize("name", ["by pair", "few", "many"])
def test_suite_sees(mistake, name):
    def broken(**args):
        return call(op_of("xla"), MISTAKES[mistake](args))

    with pytest.raises(AssertionError):
        check(broken, CASES[name], poison=False)


def test_suite_sees_unchosen_experts_leak(monkeypatch):
    def leaky(x, weights, experts, gate_up, down):  # 0 * inf instead of leaving them out
        pair = jnp.einsum("td,egfd->etgf", x, gate_up)
        out_etd = jnp.einsum("etf,edf->etd", swiglu(pair), down)
        chosen_ekt = jnp.arange(down.shape[0])[:, None, None] == experts.T
        weight_et = jnp.sum(jnp.where(chosen_ekt, weights.T, 0), axis=1)
        return xla._sum(out_etd, weight_et, x.dtype)

    monkeypatch.setattr(xla, "_every_expert", leaky)
    op = functools.partial(expert_mlp, impl="xla")  # not under a jit that has seen it before
    check(op, CASES["few"], poison=False)  # it is right but for that
    with pytest.raises(AssertionError):
        check(op, CASES["few"])
