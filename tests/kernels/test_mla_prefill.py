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
from pallas_kernels.mla_prefill import BlockList, api, cases, sparse, xla
from pallas_kernels.softmax import masked_softmax, merge
from pallas_kernels.testing import assert_close, call, distinct, jit
from tests.oracles import attention
from tests.tolerances import GRADIENT, OP

IMPLS = ["xla", "reference"]  # the others cannot return a log-sum-exp
HOPPER = "mosaic_sm90"  # which can, has tests of its own
OTHERS = [name for name in distinct(api.IMPLEMENTATIONS) if name not in (*IMPLS, HOPPER)]
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


# ------------------------------------------------------------------ block lists

LONG = cases.Case(name="long", chunks=((300, 500),), queries=512, keys=900, heads=2, shuffled=False)
PACKED = dataclasses.replace(LONG, name="two prompts", chunks=((0, 200), (100, 300)))


def pairs(plan, blocks):
    """bool [H or 1, T, S], what a list and the plan let a query see, tile by tile."""
    mask = np.asarray(dataclasses.replace(plan, rows=1).mask())
    if blocks is None:
        return mask
    seen = np.zeros((blocks.tiles.shape[0], *mask.shape[1:]), bool)
    for head, query in np.ndindex(*blocks.counts.shape):
        for tile in blocks.tiles[head, query, : blocks.counts[head, query]]:
            keys = slice(int(tile) * blocks.key_tile, (int(tile) + 1) * blocks.key_tile)
            seen[head, query * 128 : (query + 1) * 128, keys] = True
    return seen & mask


def made(maker, args, **options):
    """The list of a maker; budgets are static."""
    q_and_k = {k: args[k] for k in INPUTS[:4]} if maker is not sparse.a_shape else {}
    if maker is sparse.vertical_slash:
        options["scale"] = args["scale"]
    return jit(functools.partial(maker, **options))(**q_and_k, plan=args["plan"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 2])
def test_other_tiles_are_hidden(impl, rows):
    case = cases.Case(name="tiles", chunks=((0, 90), (0, 80)), queries=180 // rows,
                      keys=180 // rows, rows=rows, heads=2)  # fmt: skip
    args, chosen = case.make(0, poison=True), np.random.default_rng(0).random((2, 2, 3)) < 0.5
    blocks = BlockList.of(jnp.asarray(chosen), 64)
    out, lse = run(impl)(**args, blocks=blocks)
    seen = pairs(args["plan"], blocks)
    assert 0 < seen.sum() < 2 * pairs(args["plan"], None).sum()
    q_nope, q_rope, k_nope, k_rope, v = (np.float64(args[name]) for name in INPUTS)
    want_out, want_lse = np.zeros((180, 2, case.value)), np.full((180, 2), -np.inf)
    for head, query in np.ndindex(2, 180):
        if len(found := np.flatnonzero(seen[head, query])):
            scores = k_nope[found, head] @ q_nope[query, head] + k_rope[found] @ q_rope[query, head]
            want_out[query, head], want_lse[query, head] = attention.attend(
                args["scale"] * scores, v[found, head]
            )
    assert_close(out, want_out, OP["float32"], "out")
    assert_close(lse, want_lse, OP["float32"], "lse")


MAKERS = {
    "a-shape": (sparse.a_shape, {"sink": 1, "local": 1}, {"sink": 900, "local": 1}),
    "vertical-slash": (
        sparse.vertical_slash,
        {"verticals": 0, "slashes": 0},
        {"verticals": 1, "slashes": 99},
    ),
    "block-sparse": (sparse.block_sparse, {"top": 0}, {"top": 99}),
}


@pytest.mark.parametrize("key_tile", [64, 128])
@pytest.mark.parametrize("case", [LONG, PACKED], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_all_tiles_are_dense_and_none_keeps_a_query_its_own_key(name, case, key_tile):
    maker, least, most = MAKERS[name]
    args = case.make(0, poison=True)
    dense = pairs(args["plan"], None)
    everything = pairs(args["plan"], made(maker, args, **most, key_tile=key_tile))
    np.testing.assert_array_equal(everything, np.broadcast_to(dense, everything.shape))
    few = pairs(args["plan"], made(maker, args, **least, key_tile=key_tile))
    np.testing.assert_array_equal(
        few.any(axis=2), np.broadcast_to(dense.any(axis=2), few.shape[:2])
    )
    assert few.sum() < len(few) * dense.sum()


@pytest.mark.parametrize(("sink", "local"), [(1, 1), (130, 200), (0, 64)])
def test_a_shape_keeps_the_first_and_the_last_keys(sink, local):
    plan = LONG.make(0)["plan"]
    got = sparse.a_shape(plan, sink=sink, local=local, key_tile=64)
    query, key = np.asarray(plan.query_pos)[:, None], np.asarray(plan.key_pos)
    wanted = pairs(plan, None)[0] & ((key < sink) | (query - key < local))
    wide = np.pad(wanted, ((0, 0), (0, -900 % 64))).reshape(4, 128, -1, 64).any(axis=(1, 3))
    np.testing.assert_array_equal(got.chosen(wide.shape[1])[0], wide)


def planted():
    """Queries of head 0 look at keys 128 to 191, those of head 1 at the key 256 before."""
    rng = np.random.default_rng(0)
    case = dataclasses.replace(LONG, chunks=((0, 512),), keys=512, same_rows=True, nope=64)
    args = case.make(0)
    q_nope, k_nope = (np.zeros((512, 2, 64), np.float32) for _ in range(2))
    q_nope[:, 0, 0], k_nope[128:192, 0, 0] = 20.0, 20.0
    codes = rng.choice([-2.0, 2.0], (512, 64))
    k_nope[:, 1], q_nope[256:, 1] = codes, codes[:-256]
    changed = {"q_nope": q_nope, "k_nope": k_nope, "q_rope": np.zeros((512, 2, 8), np.float32)}
    return args | {name: jnp.asarray(x) for name, x in changed.items()}


def test_vertical_slash_finds_the_column_and_the_diagonal():
    args, own = planted(), np.arange(4)[:, None] * 2
    found = [
        made(sparse.vertical_slash, args, verticals=v, slashes=s, key_tile=64).chosen(8)
        for v, s in ((1, 0), (0, 1))
    ]
    tile = np.arange(8)
    near = (tile == own) | (tile == own + 1)
    np.testing.assert_array_equal(found[0][0], near | ((tile == 2) & (own > 2)))
    # A query sees the key 256 before it, and a tile of 128 queries those of three tiles of keys.
    far = (tile >= own - 4) & (tile <= own - 3)
    assert (np.asarray(found[1][1]) >= far).all()
    assert np.asarray(found[1][1]).sum() <= near.sum() + 2 * 3


def test_block_sparse_finds_the_tiles_with_the_largest_means():
    args = planted()
    chosen = made(sparse.block_sparse, args, top=1, key_tile=64).chosen(8)[0]
    own = np.arange(4)[:, None] * 2
    tile = np.arange(8)
    far = (tile == 2) & (own > 2)
    assert (np.asarray(chosen) >= far).all()
    np.testing.assert_array_equal(chosen.sum(axis=1), [2, 3, 3, 3])


def test_suite_sees_a_list_without_own_tiles(monkeypatch):
    monkeypatch.setattr(sparse, "_near", lambda p, local: jnp.zeros_like(p.seen))
    with pytest.raises(AssertionError):
        test_all_tiles_are_dense_and_none_keeps_a_query_its_own_key("block-sparse", LONG, 64)


@pytest.mark.parametrize(
    ("shape", "key_tile", "message"),
    [
        ((2, 4, 9), 96, "blocks.key_tile=96 must be 64 or 128"),
        ((3, 4, 9), 128, r"lists \(3, 4\).*2 heads and 512 queries need lists \(1 or 2, 4\)"),
        ((1, 2, 9), 128, r"lists \(1, 2\)"),
    ],
)
def test_block_lists_are_checked(shape, key_tile, message):
    blocks = BlockList.of(jnp.ones(shape, bool), key_tile)
    with pytest.raises(ValueError, match=message):
        mla_prefill(**LONG.make(0), blocks=blocks)


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
