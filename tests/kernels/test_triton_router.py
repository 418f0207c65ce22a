"""The Triton kernel of `route`: exactly the reference's experts, bugs the suite sees, lowering for
CUDA, and runs on a GPU.

`test_router.py` interprets it on the same cases as every other implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import route, triton_ops
from pallas_kernels.router import api, cases, reference, triton
from pallas_kernels.select import choose, no_ada, whole_arrays_only
from pallas_kernels.testing import assert_close, assert_equal, call
from pallas_kernels.testing.lower import lower_for_h100
from tests.kernels.router_suite import CASES, check, interpreted, run
from tests.tolerances import GATE

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")


ODD = {
    f"any {name}": dataclasses.replace(CASES[name], name=f"any {name}", experts=20, top_k=17)
    for name in ("v2 groups", "v3 groups")
}


def same(op, args, rows=slice(None)):
    """The experts are the reference's, weights are as near as sums of fp32 can be."""
    weights, experts = op(**args)
    want_weights, want_experts = call(reference.route, args)
    assert_equal(experts[rows], want_experts[rows], "experts")
    assert_close(weights[rows], want_weights[rows], GATE, "weights")


# ------------------------------------------------------------------ exactly the reference


@on_cpu
@pytest.mark.parametrize("case", cases.CI + cases.FULL, ids=str)
def test_is_the_reference(case):
    same(interpreted, case.make(1))


@on_cpu
@pytest.mark.parametrize("name", ["v3 groups", "v2 groups", "no groups"])
@pytest.mark.parametrize("poison", [np.nan, -np.nan, np.inf, -np.inf])
def test_poison_stays_in_its_row(name, poison):
    """A value in one row and a whole row of it; experts are real ones and differ all the same."""
    args = CASES[name].make(2)
    clean = interpreted(**args)
    args["logits"] = args["logits"].at[0, 1].set(poison).at[2].set(poison)
    weights, experts = interpreted(**args)
    others = np.r_[1, 3 : len(experts)]
    for got, want in zip((weights, experts), clean, strict=True):
        assert_equal(got[others], want[others])
    for row in np.asarray(experts[np.array([0, 2])]):
        assert len(set(row)) == len(row) and 0 <= row.min() and row.max() < CASES[name].experts


@on_cpu
@pytest.mark.parametrize("name", ["v3 groups", "v2 groups", "no groups", "v2-lite"])
def test_equal_scores_name_the_first_experts(name):
    args = CASES[name].make(0)
    args["logits"] = jnp.zeros_like(args["logits"])
    args["bias"] = None if args["bias"] is None else jnp.zeros_like(args["bias"])
    _, experts = interpreted(**args)
    assert_equal(experts, np.tile(np.arange(CASES[name].top_k, dtype=np.int32), (len(experts), 1)))


@on_cpu
@settings(max_examples=8)
@given(data=st.data())
def test_any_sizes(data):
    groups = data.draw(st.integers(1, 6), "groups")
    size = data.draw(st.integers(2, 9), "size")
    topk_group = data.draw(st.integers(1, groups), "topk_group")
    case = cases.Case(
        name="any",
        tokens=3,
        experts=groups * size,
        top_k=data.draw(st.integers(1, groups * size), "top_k"),
        n_group=groups,
        topk_group=topk_group,
        bias=data.draw(st.sampled_from([None, (0.0, 0.0), (-2.0, 1.0)]), "bias"),
        norm_topk_prob=data.draw(st.booleans(), "norm_topk_prob"),
        logits=data.draw(st.sampled_from(["ties", "normal"]), "logits"),
    )
    same(interpreted, case.make(data.draw(st.integers(0, 9), "seed")))


@on_cpu
@pytest.mark.parametrize("name", ["v3 groups", "v2 groups"])
def test_derivatives_are_the_reference(name):
    args = CASES[name].make(0)
    names = ("logits", "bias")[: 2 if args["bias"] is not None else 1]
    static = {k: v for k, v in args.items() if k not in names}

    def slopes(op):
        def loss(arrays):
            weights, _ = op(**arrays, **static)
            return (weights * jnp.arange(weights.size).reshape(weights.shape)).sum()

        return jax.jit(jax.grad(loss))({k: args[k] for k in names})

    got = slopes(functools.partial(triton.route, interpret=True))
    jax.tree.map(lambda a, b: assert_close(a, b, GATE), got, slopes(reference.route))


@on_cpu
@pytest.mark.parametrize("name", ["any v2 groups", "any v3 groups"])
def test_padding_never_wins(name):
    """Groups of 5 in 8 places; more experts are wanted than the kept groups have."""
    same(interpreted, ODD[name].make(0))


def test_integers_have_the_order_of_floats():
    tiny = np.finfo(np.float32).smallest_subnormal
    floats = [-np.inf, -1e30, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, 1e30, np.inf]
    keys = np.asarray(triton_ops.order(jnp.asarray(floats, jnp.float32)))
    assert (np.diff(keys) > 0).all() and keys[0] == triton_ops.MINUS_INFINITY > triton_ops.LAST
    assert_equal(triton_ops.value(jnp.asarray(keys)), np.float32(floats))
    nan = np.asarray([0x7FC00000, 0xFFC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert (np.asarray(triton_ops.order(jnp.asarray(nan))) > keys[-1]).all()


# ------------------------------------------------------------------ planted bugs


def has(name, replacement):
    def op(monkeypatch):
        monkeypatch.setattr(triton, name, replacement)

        def run(**args):  # traced again, with the bug
            static = {k: v for k, v in args.items() if k not in ("logits", "bias")}
            return jax.jit(functools.partial(triton.route, **static, interpret=True))(
                args["logits"], args["bias"]
            )

        return run

    return op


def _last_first(keys, count):
    flipped = keys.shape[0] - 1
    for where, key in triton_largest(keys[::-1], count):
        yield flipped - where, key


triton_largest = triton._largest
BUGS = {
    "ties to the highest index": ("ties in groups", has("_largest", _last_first)),
    "groups masked with 0.0": ("negative bias", has("MINUS_INFINITY", 0)),
    "integers of negative floats not turned": (
        "negative bias",
        has("order", lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)),
    ),
    "padding wins": ("any v2 groups", has("LAST", 0)),
    "logits chosen, not scores": ("v3 groups", has("sigmoid", lambda x, _: x)),
    "no group left out": ("v3 groups", has("_is_kept", lambda keys, *_, **__: keys == keys)),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug, monkeypatch):
    name, op = BUGS[bug]
    case = (CASES | ODD)[name]
    same(interpreted, case.make(0))
    with pytest.raises(AssertionError):
        same(op(monkeypatch), case.make(0))


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"experts": 2048}, "needs 1 <= top_k <= experts <= 1024, not 4 of 2048"),
        ({"top_k": 17}, "not 17 of 16"),
        ({"n_group": 3}, "groups of one size, not 2 of 3 groups of 16"),
        ({"topk_group": 5}, "not 5 of 4 groups"),
        ({"n_group": 64, "experts": 128}, "n_group <= 32 groups"),
        ({"n_group": 16}, "two experts in a group"),
    ],
)
def test_refusals_name_what_is_needed(sizes, reason):
    args = dataclasses.replace(CASES["v3 groups"], **sizes).make(0)
    refusal = api.triton_refusal(**args)
    assert refusal is not None and reason in refusal


@on_cpu
def test_a_cpu_never_runs_it():
    args = CASES["v3 groups"].make(0)
    assert "needs an NVIDIA GPU" in str(no_ada())
    with pytest.raises(NotImplementedError, match="router.*triton.*needs an NVIDIA GPU"):
        route(**args, impl="triton")
    chosen = choose("router", "auto", api.IMPLEMENTATIONS, **args)
    assert chosen is reference.route


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_auto_leaves_arrays_that_may_be_split_to_xla():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    found = {}

    def ask(where):
        def inner(x):
            found[where] = whole_arrays_only(x)
            return x

        return inner

    x = jnp.zeros(2)
    jax.jit(ask("outside"))(x)
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    jax.jit(sharded(ask("inside")))(x)
    assert "devices may share an array" in found["outside"] and found["inside"] is None


# ------------------------------------------------------------------ lowering for CUDA


@pytest.mark.parametrize("case", cases.BENCH, ids=str)
def test_lowers_for_cuda(case):
    args = case.make(0)
    arrays = {k: args.pop(k) for k in ("logits", "bias")}
    text = lower_for_h100(functools.partial(triton.route, **args), **arrays)
    assert text.count("xla.gpu.triton") == 1 and "num_warps = 1" in text


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_matches_oracle_on_a_gpu(case):
    if reason := no_ada():
        pytest.skip(reason)
    check(run("triton"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.bias is not None], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_is_the_reference_on_a_gpu(case, seed):
    """Sigmoids are computed as XLA does: no expert differs among 100,000."""
    if reason := no_ada():
        pytest.skip(reason)
    same(run("triton"), case.make(seed))


@pytest.mark.gpu
def test_auto_takes_it_on_a_gpu():
    if reason := no_ada():
        pytest.skip(reason)
    args = CASES["v3 groups"].make(0)
    chosen = choose("router", "auto", api.IMPLEMENTATIONS, **args)
    assert (chosen is api.IMPLEMENTATIONS[0].run) == (jax.device_count() == 1)
