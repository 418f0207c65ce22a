"""Contracts of the acceptance rules: shapes, ties, short rows, no NaN; eos and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode import acceptance
from dskjax.decode.acceptance import RULES, Accepted, truncate_at_stop
from dskjax.decode.sampling import (
    sample,
)
from tests.oracles import enumeration as enum

PROBS = {
    "rejection": jax.jit(acceptance.rejection_accept_probs),
    "block": jax.jit(acceptance.block_accept_probs),
}
RESIDUALS = {
    "rejection": jax.jit(acceptance.rejection_residual),
    "block": jax.jit(acceptance.block_residual),
}
JITTED = {name: jax.jit(rule) for name, rule in RULES.items()}


# ------------------------------------------------------------------ contracts of the rules


def random_step(rng, batch, m, vocab, sharp=2.0):
    p = enum.softmax(sharp * rng.standard_normal((batch, m + 1, vocab)))
    q = enum.softmax(np.log(p[:, :m]) + rng.standard_normal((batch, m, vocab)))
    drafts = (q.cumsum(-1) > rng.random((batch, m, 1))).argmax(-1).astype(np.int32)
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    u_accept, u_final = rng.random((batch, m)), rng.random((batch, m + 1))
    return f32(p), jnp.asarray(drafts), f32(q), f32(u_accept), f32(u_final)


@pytest.mark.parametrize("kind", sorted(RULES))
def test_without_drafts_every_rule_is_plain_sampling(kind):
    p, drafts, q, u_accept, u_final = random_step(np.random.default_rng(0), 64, 0, 11)
    out = JITTED[kind](p, drafts, q, u_accept, u_final)
    np.testing.assert_array_equal(out.tokens, sample(p, u_final))
    assert (out.count == 1).all() and out.tokens.dtype == out.count.dtype == jnp.int32


@pytest.mark.parametrize("kind", sorted(RULES))
def test_shape_of_the_answer(kind):
    """Accepted drafts, one token in the target's support, then zeros."""
    p, drafts, q, u_accept, u_final = random_step(np.random.default_rng(1), 256, 3, 7)
    p = jnp.where(p < 0.05, 0, p)
    out = JITTED[kind](p, drafts, q, u_accept, u_final)
    p, drafts, out = jax.device_get((p, drafts, out))
    counts = set()
    for b in range(256):
        count = int(out.count[b])
        counts.add(count)
        assert (out.tokens[b, : count - 1] == drafts[b, : count - 1]).all()
        assert (p[b, np.arange(count), out.tokens[b, :count]] > 0).all()
        assert (out.tokens[b, count:] == 0).all()
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("kind", ["rejection", "block"])
def test_absent_q_means_argmax_drafts(kind):
    p, drafts, _, u_accept, u_final = random_step(np.random.default_rng(2), 256, 3, 7)
    one_hot = jax.nn.one_hot(drafts, 7, dtype=jnp.float32)
    want = JITTED[kind](p, drafts, one_hot, u_accept, u_final)
    got = JITTED[kind](p, drafts, None, u_accept, u_final)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.count, want.count)


@pytest.mark.parametrize("absent", ["zero_q", "no_token"])
@pytest.mark.parametrize("kind", ["rejection", "block"])
def test_rows_may_have_fewer_drafts(kind, absent):
    """Zeros in q, or with q=None a draft that is no token, shorten the row exactly."""
    p, drafts, q, u_accept, u_final = random_step(np.random.default_rng(3), 256, 3, 7)
    if absent == "no_token":
        q = None
    for k in (0, 2) if absent == "zero_q" else (1,):
        short_q = None if q is None else q[:, :k]
        want = JITTED[kind](
            p[:, : k + 1], drafts[:, :k], short_q, u_accept[:, :k], u_final[:, : k + 1]
        )
        if q is None:
            got = JITTED[kind](p, drafts.at[:, k:].set(-1), None, u_accept, u_final)
        else:
            got = JITTED[kind](p, drafts, q.at[:, k:].set(0), u_accept, u_final)
        np.testing.assert_array_equal(got.count, want.count)
        np.testing.assert_array_equal(got.tokens[:, : k + 1], want.tokens)


@pytest.mark.parametrize("kind", sorted(RULES))
def test_greedy_rows_coincide(kind):
    """One-hot p: whatever the uniforms, a rule keeps the argmax prefix and corrects with argmax."""
    rng = np.random.default_rng(4)
    p, drafts, q, u_accept, u_final = random_step(rng, 256, 3, 7)
    greedy = jax.nn.one_hot(jnp.argmax(p, -1), 7, dtype=jnp.float32)
    drafts = jnp.argmax(q, -1).astype(jnp.int32)
    got = JITTED[kind](greedy, drafts, None, u_accept, u_final)
    want = JITTED["strict"](greedy, drafts, None, 1 - u_accept, 1 - u_final)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.count, want.count)


def test_vmap():
    kind = "block"
    args = random_step(np.random.default_rng(5), 24, 2, 5)
    want = JITTED[kind](*args)
    got = jax.jit(jax.vmap(RULES[kind]))(*(x.reshape(4, 6, *x.shape[1:]) for x in args))
    np.testing.assert_array_equal(got.tokens.reshape(24, 3), want.tokens)
    np.testing.assert_array_equal(got.count.reshape(24), want.count)


@pytest.mark.parametrize("kind", ["rejection", "block"])
@pytest.mark.parametrize("tiny", [0.0, 1e-38, 1e-30, 1.0])
def test_no_nan_whatever_comes(kind, tiny):
    """Impossible drafts, vanishing q, p = 0 then p > 0 at a huge ratio, ids that are no tokens.

    With u = 0 too, a possible draw: a draft that the target forbids must still be rejected.
    """
    p = jnp.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]]] * 5)
    q = jnp.array([[[1.0, tiny, 0.0], [tiny, 1.0, 0.0], [0.2, 0.3, 0.5]]] * 5)
    drafts = jnp.array([[0, 0, 2], [1, 0, 0], [2, 2, 2], [-1, 3, 1], [1, 1, 1]])
    h = PROBS[kind](p, drafts, q)
    assert ((h >= 0) & (h <= 1)).all()
    for accepted in range(4):
        law = RESIDUALS[kind](p, drafts, q, jnp.full(5, accepted))
        np.testing.assert_allclose(law.sum(-1), 1, atol=1e-6)
    for u in (0.0, 0.5, 1 - 2**-24):
        out = JITTED[kind](p, drafts, q, jnp.full((5, 3), u), jnp.full((5, 4), u))
        out = jax.device_get(out)
        for b in range(5):
            count = int(out.count[b])
            assert (np.asarray(p)[b, np.arange(count), out.tokens[b, :count]] > 0).all()


def test_residual_of_equal_laws_falls_back_to_p():
    p = jnp.array([[[0.25, 0.75], [0.5, 0.5]]])
    law = acceptance.rejection_residual(p, jnp.array([[1]]), p[:, :1], jnp.array([0]))
    np.testing.assert_array_equal(law, p[:, 0])


@pytest.mark.parametrize("kind", sorted(RULES))
def test_wrong_shapes_are_named(kind):
    p, drafts, q, u_accept, u_final = random_step(np.random.default_rng(6), 4, 2, 5)
    with pytest.raises(ValueError, match=r"drafts \(4, 2\) instead of \(4, 1\).*bonus"):
        RULES[kind](p[:, :2], drafts, q, u_accept, u_final[:, :2])


def test_accepted_is_a_pytree_under_the_type_hook():
    accepted = Accepted(tokens=jnp.zeros((2, 3), jnp.int32), count=jnp.ones(2, jnp.int32))
    assert jax.tree.map(lambda x: x.shape, accepted).tokens == (2, 3)
    assert jax.eval_shape(lambda x: x, accepted).count.shape == (2,)


# ------------------------------------------------------------------ eos and limits

EOS = 9


@pytest.mark.parametrize(
    "tokens,count,limit,want,finished",
    [
        ([3, 4, 5, 6], 4, 99, [3, 4, 5, 6], False),
        ([3, EOS, 5, 6], 4, 99, [3, EOS], True),  # inside the accepted drafts
        ([EOS, EOS, 5, 6], 3, 99, [EOS], True),
        ([3, 4, 5, EOS], 4, 99, [3, 4, 5, EOS], True),  # the bonus token
        ([3, 8, EOS, 0], 3, 99, [3, 8], True),  # whichever eos id comes first
        ([3, 4, EOS, EOS], 2, 99, [3, 4], False),  # beyond the count is padding
        ([3, 4, 5, 6], 4, 2, [3, 4], True),
        ([3, 4, 5, 6], 4, 4, [3, 4, 5, 6], True),
        ([3, 4, EOS, 6], 4, 2, [3, 4], True),  # the eos is past the limit
        ([3, EOS, 5, 6], 4, 2, [3, EOS], True),
        ([3, 4, 5, 6], 4, 0, [], True),  # an idle row
        ([EOS, 4, 5, 6], 4, -1, [], True),
    ],
)
def test_truncate_at_stop(tokens, count, limit, want, finished):
    accepted = Accepted(tokens=jnp.array([tokens]), count=jnp.array([count]))
    out, done = jax.jit(truncate_at_stop)(accepted, jnp.array([[EOS, 8, -1]]), jnp.array([limit]))
    assert int(out.count[0]) == len(want) and bool(done[0]) is finished
    assert out.tokens[0].tolist() == want + [0] * (4 - len(want))
    assert out.tokens.dtype == out.count.dtype == jnp.int32


def test_without_stop_ids_only_the_limit_ends_a_row():
    accepted = Accepted(tokens=jnp.full((1, 3), EOS), count=jnp.array([3]))
    out, done = truncate_at_stop(accepted, jnp.array([[-1]]), jnp.array([7]))
    assert int(out.count[0]) == 3 and not done[0]
