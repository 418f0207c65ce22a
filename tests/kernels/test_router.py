"""`route`: experts exactly, weights within fp32, ties and golden vectors included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import route
from pallas_kernels.router import cases
from pallas_kernels.testing import assert_close, assert_equal
from tests.kernels.router_suite import CASES, IMPLS, check, expected, oracle, run
from tests.tolerances import GATE, GOLDEN_6_DIGITS


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.full
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.FULL, ids=str)
def test_matches_oracle_on_real_shapes(impl, case):
    check(run(impl), case)


@settings(max_examples=25)
@given(levels=st.lists(st.integers(0, 2), min_size=16, max_size=16), bias=st.booleans())
def test_any_ties_go_to_the_lowest_index(levels, bias):
    args = CASES["ties in groups"].make(0)
    args["logits"] = jnp.tile(jnp.asarray([0.0, 1.0, 3.0])[jnp.asarray(levels)], (33, 1))
    args["bias"] = jnp.where(jnp.arange(16) == 5, 0.25, 0.0) if bias else args["bias"]
    _, want = oracle(args | {"logits": args["logits"][:1]})
    assert_equal(run("reference")(**args)[1][:1], want)


# ------------------------------------------------------------------ golden vectors

LOGITS = [1.2, -0.3, 0.4, 2, -1, 0.1, 0.9, -2]
MIXED_BIAS = [-0.9, 0.05, 0.3, -0.8, 0.6, -0.2, 0, 0.4]
LOW_BIAS = [-1.5] * 4 + [0.6, -0.2, 0, 0.4]
GOLDEN = [
    (MIXED_BIAS, 2, {6: 1.813849, 4: 0.686151}),
    (MIXED_BIAS, 2, {4: 0.413992, 6: 1.094393, 7: 0.183494, 5: 0.808121}),
    (LOW_BIAS, 3, {4: 0.21664, 6: 0.572689, 7: 0.096021, 5: 0.422885, 3: 0.709506, 2: 0.482259}),
]


def golden(bias, topk_group, want, op=route):
    weights, experts = op(
        logits=jnp.asarray([LOGITS], jnp.float32),
        bias=jnp.asarray(bias, jnp.float32),
        top_k=len(want),
        scoring_func="sigmoid",
        n_group=4,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    assert set(np.asarray(experts[0]).tolist()) == set(want)
    in_order = [want[e] for e in np.asarray(experts[0]).tolist()]
    assert_close(weights[0], np.array(in_order), GOLDEN_6_DIGITS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("bias", "topk_group", "want"), GOLDEN)
def test_golden_vectors(impl, bias, topk_group, want):
    golden(bias, topk_group, want, run(impl))


@pytest.mark.parametrize("topk_group", [2, 3])
def test_golden_group_scores_decide(topk_group):
    """Group scores .344082 .979485 1.193921 1.230152: the first is the first to go."""
    _, experts = route(
        jnp.asarray([LOGITS], jnp.float32),
        jnp.asarray(MIXED_BIAS, jnp.float32),
        top_k=2 * topk_group,
        scoring_func="sigmoid",
        n_group=4,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    assert set(np.asarray(experts[0]) // 2) == set(range(4 - topk_group, 4))


V2_LOGITS = [1.2, -0.3, 2.0, -2.0, 0.1, 1.9, -1.0, 1.8]
"""Best of each pair: 1.2, 2.0, 1.9, 1.8. Two groups keep experts 2, 3, 4 and 5; 1.8 and 1.2, third
and fourth of all, are out."""


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_groups_by_hand(impl):
    weights, experts = run(impl)(
        logits=jnp.asarray([V2_LOGITS], jnp.float32),
        bias=None,
        top_k=3,
        scoring_func="softmax",
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    )
    assert np.asarray(experts).tolist() == [[2, 5, 4]]
    e = np.exp(V2_LOGITS)  # the softmax is over all experts, kept or not
    assert_close(weights, 16 * e[[2, 5, 4]][None] / e.sum(), GATE)


def test_sharp_scores_reach_experts_of_dropped_groups_with_weight_0():
    """As Hugging Face does it: masked scores are 0 and may tie with scores that underflow."""
    weights, experts = route(**CASES["v2 sharp"].make(0))
    outside = np.asarray(weights) == 0
    assert outside.any() and not outside[:, 0].any()


@pytest.mark.parametrize("name", ["v2-lite", "v2 groups"])
def test_best_first(name):
    args = CASES[name].make(0)
    weights, _ = route(**args)
    assert (np.diff(np.asarray(weights), axis=1) <= 0).all()


def test_bf16_logits_are_scored_in_fp32():
    args = CASES["v3 groups"].make(0)
    rounded = args["logits"].astype(jnp.bfloat16)
    got = route(**args | {"logits": rounded})
    want = route(**args | {"logits": rounded.astype(jnp.float32)})
    jax.tree.map(assert_equal, got, want)


# ------------------------------------------------------------------ planted bugs


def _broken(mask=None, best=None, biased=False, renorm_after=False, last=False):
    """The gates with groups written again with one thing wrong."""

    def op(logits, bias, *, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor, **_):
        v3 = bias is not None
        scores = jax.nn.sigmoid(logits) if v3 else jax.nn.softmax(logits, axis=-1)
        choice = scores + bias if v3 else scores
        grouped = choice.reshape(len(choice), n_group, -1)
        group_scores = jax.lax.top_k(grouped, best or (2 if v3 else 1))[0].sum(-1)
        kept = jax.lax.top_k(group_scores, topk_group)[1]
        is_kept = (kept[:, :, None] == jnp.arange(n_group)).any(1)
        outside = mask if mask is not None else (-jnp.inf if v3 else 0.0)
        choice = jnp.where(is_kept[..., None], grouped, outside).reshape(choice.shape)
        if last:  # ties to the highest index
            experts = choice.shape[1] - 1 - jax.lax.top_k(choice[:, ::-1], top_k)[1]
        else:
            experts = jax.lax.top_k(choice, top_k)[1]
        weights = jnp.take_along_axis(choice if biased or not v3 else scores, experts, 1)
        factor = routed_scaling_factor
        weights = weights * factor if renorm_after else weights
        if norm_topk_prob:
            weights /= weights.sum(-1, keepdims=True)
        return (weights if renorm_after else weights * factor), experts

    return op


BUGS = {
    "groups masked with 0.0": ("negative bias", {"mask": 0.0}),
    "group score is the maximum": ("v3 groups", {"best": 1}),
    "weights with the bias": ("v3 groups", {"biased": True}),
    "scaled before the sum": ("v3 groups", {"renorm_after": True}),
    "ties to the highest index": ("ties in groups", {"last": True}),
    "softmax: group score is the sum of two": ("v2 groups", {"best": 2}),
    "softmax: ties to the highest index": ("v2 ties in groups", {"last": True}),
    "softmax: groups masked with -inf": ("v2 sharp", {"mask": -jnp.inf}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    name, wrong = BUGS[bug]
    check(_broken(), CASES[name])
    with pytest.raises(AssertionError):
        check(_broken(**wrong), CASES[name])


def test_suite_sees_groups_that_do_not_limit():
    args = CASES["v2 groups"].make(0, poison=True) | {"n_group": 1, "topk_group": 1}
    with pytest.raises(AssertionError):
        check(lambda **_: route(**args), CASES["v2 groups"])


def test_suite_sees_a_missing_renormalisation():
    flipped = dataclasses.replace(CASES["no groups"], norm_topk_prob=True)
    args, want, _ = expected(CASES["no groups"], 0)
    with pytest.raises(AssertionError):
        assert_close(route(**args | flipped.make(0, poison=True))[0][:-1], want, GATE)


def test_golden_vectors_see_a_zero_mask():
    with pytest.raises(AssertionError):
        golden(*GOLDEN[2], op=_broken(mask=0.0))
