"""What the tests of `route` share: the oracle's answer to each case, the comparison, and every
implementation as a function of the op's arguments, the Triton kernel interpreted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import route
from pallas_kernels.router import api, cases
from pallas_kernels.testing import assert_close, assert_equal, call, distinct
from tests.oracles import gates
from tests.tolerances import GATE

IMPLS = distinct(api.IMPLEMENTATIONS)
CASES = {case.name: case for case in cases.CASES}


def run(impl):
    if impl == "triton" and jax.default_backend() == "cpu":
        return interpreted
    return lambda **args: call(route, args | {"impl": impl})


def interpreted(**args):
    from pallas_kernels.router import triton

    return call(triton.route, args | {"interpret": True})


def oracle(args):
    """Scores in float32, where the ties are; their order is exact, the weights are float64."""
    args = dict(args)
    logits, bias = np.asarray(args.pop("logits")), args.pop("bias")
    return gates.gate(logits, None if bias is None else np.asarray(bias), **args)


@functools.cache
def expected(case, seed):
    """(arguments whose last row is NaN, weights and experts of the rows before)."""
    args = case.make(seed, poison=True)
    return args, *oracle(args | {"logits": args["logits"][:-1]})


def choice_scores(args, experts):
    """float64 scores by which the given experts were chosen, bias included."""
    logits = np.asarray(args["logits"][:-1], np.float64)
    if args["bias"] is None:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits)) + np.asarray(args["bias"], np.float64)
    return np.take_along_axis(scores, experts, axis=1)


def check(op, case, seed=0):
    args, want_weights, want_experts = expected(case, seed)
    weights, experts = op(**args)
    assert weights.dtype == jnp.float32
    found = np.asarray(experts[:-1])
    near = np.zeros(found.shape, bool)
    if case.logits == "normal":  # a rounding error may swap two experts with all but equal scores
        near = np.abs(choice_scores(args, found) - choice_scores(args, want_experts)) < 2e-7
    assert_equal(np.where(near, want_experts, found), want_experts, "experts")
    order, want_order = np.argsort(found, axis=1), np.argsort(want_experts, axis=1)
    by_expert = np.take_along_axis(np.asarray(weights[:-1]), order, axis=1)
    assert_close(by_expert, np.take_along_axis(want_weights, want_order, axis=1), GATE, "weights")
    last = np.asarray(experts[-1])
    assert ((0 <= last) & (last < case.experts)).all(), "a NaN row must still name real experts"
