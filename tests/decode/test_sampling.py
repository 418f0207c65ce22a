"""Parameters, `distribution` against a loop in float64, `sample` at its edges, the uniforms."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dskjax.decode.sampling import (
    SamplingParams,
    Use,
    distribution,
    sample,
    step_uniforms,
    uniforms,
)
from tests.oracles.enumeration import truncated_distribution

JITTED = jax.jit(distribution)
SAMPLE = jax.jit(sample)
BELOW_ONE = np.float32(1 - 2**-24)  # the largest uniform there is


ROWS, VOCAB = 4, 8


def f64_distribution(logits, **params):
    """Rows and tokens are padded to one shape, so that there is one compilation."""
    rows, vocab = np.shape(logits)
    padded = np.full((ROWS, VOCAB), -np.inf)
    padded[:, 0] = 0
    padded[:rows, :vocab] = logits
    params = {k: list(v) + [0] * (ROWS - rows) if np.ndim(v) else v for k, v in params.items()}
    with jax.enable_x64(True):
        out = JITTED(jnp.asarray(padded), SamplingParams.make(ROWS, **params))
        assert out.dtype == jnp.float64
        return np.asarray(out)[:rows, :vocab]


def row(logits, **params):
    return f64_distribution([logits], **params)[0]


# ------------------------------------------------------------------ distribution

# A coarse grid, so that ties are common.
LOGIT = st.sampled_from([-np.inf, -3.0, -1.5, -0.0, 0.0, 0.25, 1.0, 2.0, 7.0])
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.1, 0.6, 1.0, 1.7, 100.0]),
        "top_p": st.sampled_from([0.0, 1e-6, 0.1, 0.35, 0.5, 0.75, 0.9, 0.999999, 1.0]),
        "top_k": st.integers(0, VOCAB + 2),
        "min_p": st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    }
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.lists(st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB), min_size=ROWS, max_size=ROWS),
    st.lists(PARAMS, min_size=ROWS, max_size=ROWS),
)
def test_distribution_matches_the_loop(logits, rows):
    logits = np.array(logits)
    logits[np.isinf(logits).all(-1), 3] = 0.0  # one token must be possible
    ours = f64_distribution(logits, **{name: [r[name] for r in rows] for name in rows[0]})
    for b, params in enumerate(rows):
        params = {k: np.float32(v) if k != "top_k" else v for k, v in params.items()}
        want = truncated_distribution(logits[b], **params)
        np.testing.assert_array_equal(ours[b] > 0, want > 0)
        np.testing.assert_allclose(ours[b], want, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("dtype,tol", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-6)])
def test_fp32_result_for_model_logits(dtype, tol):
    """[B, T, X] with parameters per row; bf16 logits are widened, not computed in."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((3, 5, 200)), dtype)
    given = {"temperature": [0.7, 0.0, 1.3], "top_p": [0.9, 0.5, 1.0], "top_k": [0, 9, 40]}
    out = JITTED(logits, SamplingParams.make(3, **given, min_p=0.01))
    assert out.dtype == jnp.float32 and out.shape == logits.shape
    for b in range(3):
        params = {k: np.float32(v[b]) if k != "top_k" else v[b] for k, v in given.items()}
        for t in range(5):
            want = truncated_distribution(logits[b, t], **params, min_p=np.float32(0.01))
            np.testing.assert_allclose(out[b, t], want, atol=tol)
            np.testing.assert_array_equal(np.asarray(out[b, t]) > 0, want > 0)


def test_temperature_zero_is_an_exact_one_hot_at_the_lowest_id():
    logits = [[1.0, 5.0, 5.0, -np.inf], [0.0, 0.0, 0.0, 0.0]]
    out = f64_distribution(np.array(logits), temperature=0, top_p=0.1, top_k=2, min_p=1.0)
    np.testing.assert_array_equal(out, [[0, 1, 0, 0], [1, 0, 0, 0]])


def test_top_k_ties_keep_exactly_k_lowest_ids():
    np.testing.assert_array_equal(row([2.0, 2.0, 3.0, 2.0], top_k=2) > 0, [1, 0, 1, 0])
    np.testing.assert_array_equal(row([0.0] * 5, top_k=3) > 0, [1, 1, 1, 0, 0])
    # Negative zero ties with zero.
    np.testing.assert_array_equal(row([-0.0, 0.0, -1.0], top_k=1) > 0, [1, 0, 0])


def test_top_p_keeps_the_shortest_prefix():
    quarter = [0.0] * 4
    for top_p, kept in [(0.0, 1), (0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.76, 4)]:
        assert (row(quarter, top_p=top_p) > 0).sum() == kept
    np.testing.assert_array_equal(row(quarter, top_p=0.5), [0.5, 0.5, 0, 0])


def test_cuts_apply_in_order():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Of the two that top-k leaves, the first has 4/7 of the mass: enough, though 0.4 is not.
    np.testing.assert_allclose(row(logits, top_k=2, top_p=0.5), [1, 0, 0, 0])
    np.testing.assert_allclose(row(logits, top_p=0.5), [4 / 7, 3 / 7, 0, 0])
    # min-p does not shrink the mass that top-p counts.
    np.testing.assert_allclose(row(logits, top_p=0.85, min_p=0.6), [4 / 7, 3 / 7, 0, 0])
    # Temperature first: at T = 2 the same top_p keeps more.
    assert (row(logits, temperature=2.0, top_p=0.75) > 0).sum() == 3
    assert (row(logits, temperature=0.5, top_p=0.75) > 0).sum() == 2


def test_extreme_temperatures_give_no_nan():
    logits = np.array([[3e38, -3e38, 0.0, 3e38], [1e-30, 0.0, -np.inf, -np.inf]], np.float32)
    for temperature in (1e-45, 1e-30, 1e-3, 1.0, 3e38):
        params = SamplingParams.make(2, temperature=temperature, top_p=0.9, top_k=3)
        out = np.asarray(JITTED(jnp.asarray(logits), params))
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out.sum(-1), 1, atol=1e-6)


def test_the_sort_runs_only_where_a_row_needs_it():
    """It sits in a branch; a row that needs no cut is the same beside one that does."""
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((2, 50)), jnp.float32)
    jaxpr = jax.make_jaxpr(distribution)(logits, SamplingParams.make(2))
    outside = {e.primitive.name for e in jaxpr.eqns}
    assert "cond" in outside and "sort" not in outside
    alone = JITTED(logits, SamplingParams.make(2))
    beside = JITTED(logits, SamplingParams.make(2, top_p=[1.0, 0.5], top_k=[0, 5]))
    np.testing.assert_array_equal(alone[0], beside[0])
    assert (beside[1] > 0).sum() <= 5


# ------------------------------------------------------------------ parameters


def test_params_broadcast_and_are_a_pytree():
    params = SamplingParams.make(3, temperature=[0, 0.5, 1], seed=2**32 - 1)
    assert params.temperature.tolist() == [0, 0.5, 1] and params.seed.tolist() == [2**32 - 1] * 3
    assert (params.top_k.dtype, params.seed.dtype) == (jnp.int32, jnp.uint32)
    assert jax.tree.map(lambda x: x.shape, params).top_p == (3,)
    assert jax.eval_shape(lambda p: p, params).min_p.dtype == jnp.float32
    swapped = jax.jit(lambda p: jax.tree.map(lambda x: x[::-1], p))(params)
    assert swapped.temperature.tolist() == [1, 0.5, 0]
    assert SamplingParams.make(0).seed.shape == (0,)


@pytest.mark.parametrize(
    "given,match",
    [
        ({"temperature": -0.1}, "temperature=-0.1.*>= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "finite"),
        ({"top_p": 1.5}, "top_p=1.5.*1 turns it off"),
        ({"top_k": -1}, "top_k=-1.*0: off"),
        ({"top_k": 2.5}, "top_k=2.5.*integer"),
        ({"min_p": [0.1, -1]}, "min_p"),
        ({"seed": -1}, "seed=-1.*2\\*\\*32"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": 2**80}, "seed="),
        ({"top_p": [0.5]}, r"top_p has shape \(1,\).*2"),
        ({"top_p": [0.5] * 3}, r"top_p has shape \(3,\)"),
    ],
)
def test_params_name_the_bad_value(given, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams.make(2, **given)


# ------------------------------------------------------------------ sample


def test_sample_at_the_edges():
    probs = jnp.array([[0.0, 0.0, 0.25, 0.0, 0.75, 0.0]] * 5)
    u = jnp.array([0.0, 0.2499, 0.25, 0.9, BELOW_ONE])
    out = SAMPLE(probs, u)
    assert out.dtype == jnp.int32 and out.tolist() == [2, 2, 4, 4, 4]


def test_sample_needs_no_normalisation_and_takes_any_shape():
    probs = jnp.broadcast_to(jnp.array([3.0, 1.0]), (2, 3, 2))
    u = jnp.array([[0.0, 0.7, 0.74], [0.75, 0.76, 0.999]])
    assert SAMPLE(probs, u).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert SAMPLE(jnp.array([0.5, 0.5]), jnp.float32(0.5)).shape == ()
    assert SAMPLE(jnp.zeros((0, 3, 4)), jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("kept", [1, 3, 1000, 100_000])
def test_sample_never_returns_a_zero_probability_token(kept):
    """A real vocabulary: fp32 cumulative sums err by more than many a probability."""
    rng = np.random.default_rng(kept)
    vocab, batch = 129_280, 8
    probs = np.zeros((batch, vocab), np.float32)
    for b in range(batch):
        ids = rng.choice(vocab, kept, replace=False)
        probs[b, ids] = rng.exponential(size=kept) ** 4
    probs /= probs.sum(-1, keepdims=True)
    for u in (np.zeros(batch), np.full(batch, BELOW_ONE), rng.random(batch)):
        out = np.asarray(SAMPLE(jnp.asarray(probs), jnp.asarray(u, jnp.float32)))
        assert (probs[np.arange(batch), out] > 0).all()
    first = (probs > 0).argmax(-1)
    np.testing.assert_array_equal(SAMPLE(jnp.asarray(probs), jnp.zeros(batch)), first)


def test_sample_past_the_end_is_the_last_possible_token():
    probs = jnp.asarray([[1.0, 2.0**-30, 0.0]], jnp.float32)  # the second adds nothing to the sum
    assert SAMPLE(probs, jnp.asarray([1.0])).tolist() == [1]  # as if u * total were rounded up
    assert SAMPLE(probs, jnp.asarray([BELOW_ONE])).tolist() == [0]


def test_sample_follows_its_law_exactly():
    """In float64, the u that give a token are its interval of the CDF, to 1e-12 at both ends."""
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.ones(7), size=50) * (rng.random((50, 7)) > 0.3)
    probs[:, 3] += 0.1
    probs /= probs.sum(-1, keepdims=True)
    high = np.cumsum(probs, -1)
    rows, tokens = np.nonzero(probs > 1e-9)
    with jax.enable_x64(True):
        for u in (high - probs + 1e-12, high - 1e-12):
            out = SAMPLE(jnp.asarray(probs[rows]), jnp.asarray(u[rows, tokens]))
            np.testing.assert_array_equal(out, tokens)


# ------------------------------------------------------------------ uniforms


BATCH = 64


@functools.partial(jax.jit, static_argnames="m")
def step(seed, start, m=3):
    return step_uniforms(seed, start, m)


def test_uniforms_do_not_depend_on_the_batch():
    rng = np.random.default_rng(0)
    seed = rng.integers(0, 2**32, BATCH).astype(np.uint32)
    start = rng.integers(0, 100_000, BATCH).astype(np.int32)
    whole = jax.device_get(step(seed, start))
    order = rng.permutation(BATCH)
    shuffled = step(seed[order], start[order])
    for all_rows, moved in zip(whole, shuffled, strict=True):
        np.testing.assert_array_equal(all_rows[order], moved)
    for b in (0, 17, 32):
        one = step(seed[b : b + 1], start[b : b + 1])
        for all_rows, alone in zip(whole, one, strict=True):
            np.testing.assert_array_equal(all_rows[b], alone[0])


def test_step_uniforms_are_the_uniforms_of_each_use():
    seed, start = np.arange(BATCH, dtype=np.uint32), np.arange(BATCH, dtype=np.int32)[::-1]
    positions = start[:, None] + np.arange(4, dtype=np.int32)
    draw = jax.jit(uniforms, static_argnames="use")
    u = step(seed, start)
    np.testing.assert_array_equal(u.draft, draw(seed, positions[:, :3], Use.DRAFT, start))
    np.testing.assert_array_equal(u.accept, draw(seed, positions[:, :3], Use.ACCEPT, start))
    np.testing.assert_array_equal(u.final, draw(seed, positions, Use.FINAL))


def test_final_depends_on_position_only_and_the_others_on_the_step_too():
    seed, start = np.full(BATCH, 7, np.uint32), np.arange(BATCH, dtype=np.int32)
    early, late, plain = jax.device_get(
        (step(seed, start), step(seed, start + 1), step(seed, start, 0))
    )
    np.testing.assert_array_equal(early.final[:, 1:], late.final[:, :-1])  # same positions
    np.testing.assert_array_equal(early.final[:, :1], plain.final)  # whatever m
    assert (early.draft[:, 1:] != late.draft[:, :-1]).all()
    assert (early.accept[:, 1:] != late.accept[:, :-1]).all()


def test_uses_seeds_positions_and_steps_all_differ():
    seed = np.repeat(np.arange(8, dtype=np.uint32), 8)
    start = np.tile(np.arange(8, dtype=np.int32), 8)
    u = jax.device_get(step(seed, start))
    for s in range(8):
        rows = seed == s
        drawn = [u.draft[rows], u.accept[rows], u.final[rows, :1]]
        drawn = np.concatenate([x.ravel() for x in drawn])
        assert len(np.unique(drawn)) == len(drawn)
    flat = np.concatenate([u.draft.ravel(), u.accept.ravel(), u.final[:, 0]])
    assert len(np.unique(flat)) > 0.999 * len(flat)  # 24 bits: a rare coincidence is due


def test_uniforms_are_uniform_and_independent_across_uses():
    """Chi-square on 16 x 16 cells of each pair of uses, at 100 000 fixed (seed, position)."""
    seed = np.repeat(np.arange(1000, dtype=np.uint32), 100)
    start = np.tile(np.arange(100, dtype=np.int32), 1000)
    u = jax.device_get(step(seed, start, 2))
    columns = [*u.draft.T, *u.accept.T, *u.final.T[:2]]
    assert all(c.dtype == np.float32 and c.min() >= 0 and c.max() < 1 for c in columns)
    for i in range(6):
        for j in range(i):
            cell = (columns[i] * 16).astype(int) * 16 + (columns[j] * 16).astype(int)
            pvalue = scipy.stats.chisquare(np.bincount(cell, minlength=256)).pvalue
            assert pvalue > 1e-5


def test_uniforms_are_pinned():
    """A seed's text must survive upgrades: these values may only change with a note to users."""
    seed, start = np.full(BATCH, 2**32 - 1, np.uint32), np.full(BATCH, 1000, np.int32)
    seed[0], start[0] = 0, 0
    u = jax.device_get(step(seed, start))
    assert [(x[:2] * 2**24).astype(int).tolist() for x in u] == PINNED
    with jax.enable_x64(True):
        wide = step(seed, start)
    for narrow, other in zip(u, wide, strict=True):
        assert other.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, other)


PINNED = [
    [[16273027, 1352652, 10937440], [12135025, 11545392, 5771807]],
    [[14472558, 12800490, 16254856], [16232247, 7437916, 15654036]],
    [[6542759, 16603339, 10696002, 6250915], [15160144, 7596504, 2542514, 7633929]],
]


def test_start_is_wanted_or_refused():
    seed, positions = jnp.zeros(1, jnp.uint32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="pass start"):
        uniforms(seed, positions, Use.ACCEPT)
    with pytest.raises(ValueError, match="leave start out"):
        uniforms(seed, positions, Use.FINAL, positions[:, 0])
