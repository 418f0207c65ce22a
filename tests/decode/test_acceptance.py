"""The acceptance rules are lossless: proved by enumeration, checked through the whole path.

The proof is itself tested with planted bugs. Also here: eos truncation and the acceptance metrics.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dskjax.decode import acceptance
from dskjax.decode.acceptance import LOSSLESS, RULES, Accepted, truncate_at_eos
from dskjax.decode.sampling import (
    SamplingParams,
    Use,
    distribution,
    sample,
    uniforms,
)
from dskjax.decode.stats import AcceptanceStats
from tests.oracles import enumeration as enum

TV_EXACT = 1e-12  # float64 sums of a few thousand terms: measured <= 1e-15
TV_BROKEN = 1e-3

PROBS = {
    "rejection": jax.jit(acceptance.rejection_accept_probs),
    "block": jax.jit(acceptance.block_accept_probs),
}
RESIDUALS = {
    "rejection": jax.jit(acceptance.rejection_residual),
    "block": jax.jit(acceptance.block_residual),
}
JITTED = {name: jax.jit(rule) for name, rule in RULES.items()}


# ------------------------------------------------------------------ models to enumerate


def _one_hot(tables):
    return [np.eye(t.shape[-1])[t.argmax(-1)] for t in tables]


def _zeroed(rng, tables):
    out = []
    for table in tables:
        table = np.where(rng.random(table.shape) < 0.35, 0, table)
        table[table.sum(-1) == 0, 0] = 1  # a row needs some support
        out.append(table / table.sum(-1, keepdims=True))
    return out


def _only(tables, ids):
    out = [np.where(np.isin(np.arange(t.shape[-1]), ids), t, 0) for t in tables]
    return [t / t.sum(-1, keepdims=True) for t in out]


def _top_p(logits, top_p):
    return [
        np.stack([enum.truncated_distribution(row, 1.0, top_p=top_p) for row in table])
        for table in logits
    ]


def make_model(name, vocab, m, seed=0):
    """(p tables, q tables) of the named situation."""
    rng = np.random.default_rng([seed, vocab, m])
    depth = 2 * m
    target = enum.random_logits(rng, vocab, depth)
    draft = [t + rng.standard_normal(t.shape) for t in target]
    p, q = [enum.softmax(t) for t in target], [enum.softmax(t) for t in draft]
    match name:
        case "random":
            return p, q
        case "zeros":
            return _zeroed(rng, p), _zeroed(rng, q)
        case "one_hot_p":
            return _one_hot(p), q
        case "one_hot_q":
            return p, _one_hot(q)
        case "one_hot_both":
            return _one_hot(p), _one_hot(q)
        case "equal":
            return p, p
        case "rounding":  # equal but for the last bits: residuals are noise
            return p, [t * (1 + 1e-15 * rng.standard_normal(t.shape)) for t in p]
        case "disjoint":
            return _only(p, [0]), _only(q, range(1, vocab))
        case "mismatch":
            return _only(p, range(vocab - 1)), _only(q, range(1, vocab))
        case "top_p_target":
            return _top_p(target, 0.7), q
        case "draft_temperature":
            return p, [enum.softmax(t, 0.5) for t in draft]
    raise AssertionError(name)


MODELS = [
    "random",
    "zeros",
    "one_hot_p",
    "one_hot_q",
    "one_hot_both",
    "equal",
    "rounding",
    "disjoint",
    "mismatch",
    "top_p_target",
    "draft_temperature",
]
SIZES = [(3, 2), (4, 2), (3, 3)]


def our_parts(rows, kind, q=None):
    """Our own tests' probabilities and final laws, in float64, as a rule given q uses them."""
    q = rows.q if q is None else q
    with jax.enable_x64(True):
        p, drafts, q = jnp.asarray(rows.p), jnp.asarray(rows.drafts, jnp.int32), jnp.asarray(q)
        h = np.asarray(PROBS[kind](p, drafts, q))
        finals = [
            RESIDUALS[kind](p, drafts, q, jnp.full(len(rows.p), accepted, jnp.int32))
            for accepted in range(drafts.shape[1] + 1)
        ]
        finals = np.stack([np.asarray(f) for f in finals], axis=1)
    assert h.dtype == finals.dtype == np.float64
    assert np.isfinite(h).all() and np.isfinite(finals).all()
    return h, finals


def tv_of_parts(p_tables, rows, h, finals, kind):
    m, vocab = rows.drafts.shape[1], rows.p.shape[-1]
    outcomes = enum.emissions(rows, h, finals, kind)
    law = enum.chain_law(*outcomes, vocab=vocab, length=m + 1)
    return enum.total_variation(law, enum.target_law(p_tables, m + 1))


def drive_rule(rule, rows, kind, rng):
    """Runs the jitted rule in every cell of its uniforms: (row, tokens, count, weight)."""
    index, u_accept, u_final, weight = enum.drive(rows, kind, rng)
    with jax.enable_x64(True):
        out = rule(
            jnp.asarray(rows.p[index]),
            jnp.asarray(rows.drafts[index], jnp.int32),
            jnp.asarray(rows.q[index]),
            jnp.asarray(u_accept),
            jnp.asarray(u_final),
        )
    return index, np.asarray(out.tokens), np.asarray(out.count), weight


def tv_of_rule(p_tables, rows, kind, rule=None):
    rng = np.random.default_rng(7)
    rule = JITTED[kind] if rule is None else rule
    index, tokens, count, weight = drive_rule(rule, rows, kind, rng)
    m, vocab = rows.drafts.shape[1], rows.p.shape[-1]
    law = enum.chain_law(
        rows.start[index], rows.context[index], tokens, count, weight, vocab=vocab, length=m + 1
    )
    return enum.total_variation(law, enum.target_law(p_tables, m + 1))


# ------------------------------------------------------------------ losslessness


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("vocab,m", SIZES)
@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_rule_is_lossless_by_enumeration(kind, vocab, m, model):
    """The jitted rule in every cell of its uniforms: m+1 tokens, in as many steps as they take."""
    p, q = make_model(model, vocab, m)
    assert tv_of_rule(p, enum.step_rows(p, q, m), kind) < TV_EXACT


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("vocab,m", SIZES)
@pytest.mark.parametrize("kind", sorted(PROBS))
def test_parts_are_lossless_and_match_the_oracle(kind, vocab, m, model):
    p, q = make_model(model, vocab, m)
    rows = enum.step_rows(p, q, m)
    h, finals = our_parts(rows, kind)
    assert tv_of_parts(p, rows, h, finals, kind) < TV_EXACT
    if model != "rounding":  # there h and the residual are ratios of rounding errors
        possible = rows.weight > 0
        np.testing.assert_allclose(h[possible], enum.accept_probs(rows, kind)[possible], atol=1e-12)
        ours, oracle = finals[possible], enum.residuals(rows, kind)[possible]
        reached = enum.length_law(h, kind)[possible] > 1e-12
        np.testing.assert_allclose(ours[reached], oracle[reached], atol=1e-10)


@pytest.mark.parametrize("kind", sorted(PROBS))
def test_rule_decides_at_its_accept_probability(kind):
    """u just below h passes, u just above fails: the rule uses the parts that were enumerated."""
    p, q = make_model("zeros", 4, 2)
    rows = enum.step_rows(p, q, 2)
    h, _ = our_parts(rows, kind)
    u_final = np.full((len(h), 3), 0.5)

    def count(u):
        with jax.enable_x64(True):
            args = (rows.p, rows.drafts.astype(np.int32), rows.q, u, u_final)
            return np.asarray(JITTED[kind](*map(jnp.asarray, args)).count)

    below, above = np.maximum(h - 1e-12, 0), np.minimum(h + 1e-12, 1 - 1e-16)
    for i in range(2):
        # All others are sent to the value that makes test i decide alone.
        others = np.zeros_like(h) if kind == "rejection" else np.full_like(h, 1 - 1e-16)
        others[h == (0 if kind == "rejection" else 1)] = np.nan
        clear = ~np.isnan(np.delete(others, i, axis=1)).any(axis=1)
        for u_i, passes in ((below, h > 0), (above, h >= 1)):
            u = np.nan_to_num(others)
            u[:, i] = u_i[:, i]
            got, want = count(u), passes[:, i]
            assert clear.sum() > 50
            np.testing.assert_array_equal((got > i + 1)[clear], want[clear])


# ------------------------------------------------------------------ the proof goes red


@pytest.mark.parametrize("kind", sorted(PROBS))
@pytest.mark.parametrize("drafted_at", [0.25, 0.5, 0.7, 1.5])
def test_wrong_q_temperature_is_seen(kind, drafted_at):
    rng = np.random.default_rng(3)
    p = [enum.softmax(t) for t in enum.random_logits(rng, 3, 4)]
    draft = enum.random_logits(rng, 3, 4)
    rows = enum.step_rows(p, [enum.softmax(t, drafted_at) for t in draft], 2)
    assert tv_of_parts(p, rows, *our_parts(rows, kind), kind) < TV_EXACT
    at_one = rows.gather([enum.softmax(t) for t in draft], 2)
    assert tv_of_parts(p, rows, *our_parts(rows, kind, q=at_one), kind) > TV_BROKEN


def _not_renormalised(rows, h, finals):
    excess = np.maximum(rows.p[:, :-1] - rows.q, 0)
    excess[..., -1] += 1 - excess.sum(-1)  # where an inverse CDF runs off its end
    return h, np.concatenate([excess, finals[:, -1:]], axis=1)


def _not_clamped(rows, h, finals):
    diff = np.abs(rows.p[:, :-1] - rows.q)
    return h, np.concatenate([diff / diff.sum(-1, keepdims=True), finals[:, -1:]], axis=1)


def _corrected_from_p(rows, h, finals):
    return h, rows.p


def _bonus_from_q(rows, h, finals, q_tables):
    return h, np.concatenate([finals[:, :-1], rows.gather(q_tables, 3)[:, -1:]], axis=1)


def _draft_and_accept_share_u(rows, h, finals):
    """P(u < h | u drew d): the part of the draft's own CDF interval that lies below h."""
    high = enum.at_drafts(np.cumsum(rows.q, -1), rows.drafts)
    q_d = enum.at_drafts(rows.q, rows.drafts)
    return np.clip((h - (high - q_d)) / q_d, 0, 1), finals


@pytest.mark.parametrize("kind", sorted(PROBS))
@pytest.mark.parametrize(
    "bug",
    [
        _not_renormalised,
        _not_clamped,
        _corrected_from_p,
        _bonus_from_q,
        _draft_and_accept_share_u,
    ],
)
def test_planted_bug_is_seen(kind, bug):
    p, q = make_model("random", 3, 2)
    rows = enum.step_rows(p, q, 2)
    h, finals = our_parts(rows, kind)
    extra = {"q_tables": q} if bug is _bonus_from_q else {}
    broken = bug(rows, h, finals, **extra)
    assert tv_of_parts(p, rows, *broken, kind) > TV_BROKEN


def test_parts_of_different_rules_do_not_mix():
    """Largest of ten models: where the first ratio exceeds 1, the two residuals hardly differ."""
    tests, finals = [], []
    for seed in range(10):
        p, q = make_model("random", 3, 2, seed)
        rows = enum.step_rows(p, q, 2)
        block, rejection = our_parts(rows, "block"), our_parts(rows, "rejection")
        finals.append(tv_of_parts(p, rows, block[0], rejection[1], "block"))
        tests.append(tv_of_parts(p, rows, rejection[0], block[1], "block"))
    assert max(finals) > TV_BROKEN and max(tests) > TV_BROKEN


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_a_shifted_final_uniform_is_seen(kind):
    """The corrected token of slot i has to use u_final[:, i]."""
    p, q = make_model("random", 3, 2)
    rows = enum.step_rows(p, q, 2)

    def shifted(p, drafts, q, u_accept, u_final):
        return JITTED[kind](p, drafts, q, u_accept, jnp.roll(u_final, 1, axis=1))

    assert tv_of_rule(p, rows, kind, shifted) > TV_BROKEN


# ------------------------------------------------------------------ how much is accepted


def expected_accepted(rows, kind, start=0):
    h, _ = our_parts(rows, kind)
    mean = enum.length_law(h, kind) @ np.arange(h.shape[1] + 1)
    here = rows.start == start
    return float((rows.weight * mean)[here].sum())


def test_paper_example():
    """Sun et al.: p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 token-wise, 11/9 as a block."""
    p = [np.tile([1 / 3, 2 / 3], (2**length, 1)) for length in range(5)]
    rows = enum.step_rows(p, [t[:, ::-1] for t in p], 2)
    assert expected_accepted(rows, "rejection") == pytest.approx(10 / 9, abs=1e-12)
    assert expected_accepted(rows, "block") == pytest.approx(11 / 9, abs=1e-12)


@pytest.mark.parametrize("vocab,m", SIZES)
def test_block_never_accepts_less_than_rejection(vocab, m):
    gains = []
    for seed in range(20):
        p, q = make_model("random" if seed % 2 else "zeros", vocab, m, seed)
        rows = enum.step_rows(p, q, m)
        gains.append(expected_accepted(rows, "block") - expected_accepted(rows, "rejection"))
    assert min(gains) > -1e-12 and max(gains) > 0.01


def test_rejection_accepts_one_minus_tv():
    p, q = make_model("random", 4, 2)
    rows = enum.step_rows(p, q, 2)
    h, _ = our_parts(rows, "rejection")
    first = (rows.weight * h[:, 0])[rows.start == 0].sum()
    assert first == pytest.approx(1 - enum.total_variation(p[0], q[0]), abs=1e-12)


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


# ------------------------------------------------------------------ with real uniforms


@functools.partial(jax.jit, static_argnames=("m", "rules", "length"))
def simulate(logits, q_table, params, rule=0, keyed=1, *, m, rules, length):
    """Decodes `length` tokens with a bigram target and drafter; also the mean of tokens a step.

    `rule` indexes `rules` and is traced, so that one compilation serves all. keyed=0 plants the bug
    that `Use` warns of: draws keyed by position without the step they belong to.
    """
    batch = params.seed.shape[0]
    rows, zero = jnp.arange(batch)[:, None], jnp.zeros(batch, jnp.int32)

    def step(_, carry):
        tokens, start, last, emitted, steps = carry
        positions = start[:, None] + jnp.arange(m + 1)
        u_draft = uniforms(params.seed, positions[:, :m], Use.DRAFT, start * keyed)
        u_accept = uniforms(params.seed, positions[:, :m], Use.ACCEPT, start * keyed)
        u_final = uniforms(params.seed, positions, Use.FINAL)
        context = [last]
        for i in range(m):
            context.append(sample(q_table[context[-1]], u_draft[:, i]))
        context = jnp.stack(context, 1)
        p, drafts, q = (
            distribution(logits[context], params),
            context[:, 1:],
            q_table[context[:, :m]],
        )
        branches = [RULES[name] for name in rules]
        out = jax.lax.switch(rule, branches, p, drafts, q, u_accept, u_final)
        slots = jnp.arange(m + 1)
        where = jnp.where(slots < out.count[:, None], positions, length)
        tokens = tokens.at[rows, where].set(out.tokens, mode="drop")
        emitted += jnp.sum(jnp.where(start < length, out.count, 0))
        steps += jnp.sum(start < length)
        last = jnp.take_along_axis(out.tokens, out.count[:, None] - 1, axis=1)[:, 0]
        return tokens, start + out.count, last, emitted, steps

    carry = jnp.zeros((batch, length), jnp.int32), zero, zero, 0, 0
    tokens, *_, emitted, steps = jax.lax.fori_loop(0, length, step, carry)  # >= 1 token a step
    return tokens, emitted / steps


def bigram(seed, vocab, noise=1.0):
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((vocab, vocab))
    return logits, logits + noise * rng.standard_normal((vocab, vocab))


def paper_example(vocab):
    with np.errstate(divide="ignore"):
        p, q = (np.log([a / 3, 1 - a / 3] + [0] * (vocab - 2)) for a in (1, 2))
    return np.tile(p, (vocab, 1)), np.tile(q, (vocab, 1))


N_SAMPLES = 200_000


def g_test_p_value(rule, model, *, temperature=1.0, top_p=1.0, drafted_at=1.0, keyed=1):
    """Law of the first three tokens of N_SAMPLES seeds against the exact target law."""
    logits, draft_logits = model
    vocab, m, length, rules = len(logits), 2, 3, sorted(LOSSLESS)
    seed = np.arange(N_SAMPLES)
    params = SamplingParams.make(N_SAMPLES, temperature=temperature, top_p=top_p, seed=seed)
    tokens, _ = simulate(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(enum.softmax(draft_logits, drafted_at), jnp.float32),
        params,
        rules.index(rule),
        keyed,
        m=m,
        rules=tuple(rules),
        length=length,
    )
    rows = [
        enum.truncated_distribution(row, np.float32(temperature), top_p=np.float32(top_p))
        for row in logits
    ]
    # The bigram as tables of prefixes: a row depends on the last token only, on token 0 at first.
    tables = [np.stack([rows[code % vocab] for code in range(vocab**n)]) for n in range(length)]
    law = enum.target_law(tables, length)
    codes = np.asarray(tokens) @ vocab ** np.arange(length)[::-1]
    seen = np.bincount(codes, minlength=vocab**length)
    assert seen[law == 0].sum() == 0
    expected, observed = N_SAMPLES * law[law > 0], seen[law > 0]
    return scipy.stats.power_divergence(observed, expected, lambda_="log-likelihood").pvalue


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("rule", sorted(LOSSLESS))
def test_sampled_law_with_real_uniforms(rule, top_p):
    """G-test at 200 000 fixed seeds, p > 1e-4 of 6 tests; deterministic."""
    model = bigram(11, 4)
    assert g_test_p_value(rule, model, temperature=0.8, top_p=top_p, drafted_at=0.5) > 1e-4


def test_block_needs_uniforms_of_its_own_step():
    """Keyed by position alone, draws that a block used to stop early come back in the next step.

    On the paper's example that shifts the law of two tokens by TV 1/18.
    """
    assert g_test_p_value("block", paper_example(4)) > 1e-4
    assert g_test_p_value("block", paper_example(4), keyed=0) < 1e-100
    # Token-wise rejection never looks past the token it stops at, so it would not notice.
    assert g_test_p_value("rejection", paper_example(4), keyed=0) > 1e-4


def test_token_by_token_gives_the_same_tokens_as_no_speculation():
    vocab, batch, length = 17, 384, 20
    logits, draft_logits = bigram(5, vocab, noise=0.5)
    rng = np.random.default_rng(0)
    params = SamplingParams.make(
        batch,
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7], batch),
        top_p=rng.choice([1.0, 0.9, 0.5], batch),
        top_k=rng.choice([0, 3, 8], batch),
        min_p=rng.choice([0.0, 0.05], batch),
        seed=rng.integers(0, 2**32, batch),
    )
    q_table = jnp.asarray(enum.softmax(draft_logits, 0.5), jnp.float32)
    args = jnp.asarray(logits, jnp.float32), q_table, params
    plain, one = simulate(*args, m=0, rules=("strict",), length=length)
    assert one == 1
    speculated, tokens_per_step = simulate(*args, m=3, rules=("strict",), length=length)
    np.testing.assert_array_equal(speculated, plain)
    assert tokens_per_step > 1.5  # the drafts did something


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
def test_truncate_at_eos(tokens, count, limit, want, finished):
    accepted = Accepted(tokens=jnp.array([tokens]), count=jnp.array([count]))
    run = jax.jit(truncate_at_eos, static_argnums=1)
    out, done = run(accepted, (EOS, 8), jnp.array([limit]))
    assert int(out.count[0]) == len(want) and bool(done[0]) is finished
    assert out.tokens[0].tolist() == want + [0] * (4 - len(want))
    assert out.tokens.dtype == out.count.dtype == jnp.int32


def test_without_eos_ids_only_the_limit_ends_a_row():
    accepted = Accepted(tokens=jnp.full((1, 3), EOS), count=jnp.array([3]))
    out, done = truncate_at_eos(accepted, (), jnp.array([7]))
    assert int(out.count[0]) == 3 and not done[0]


# ------------------------------------------------------------------ metrics


def test_stats_name_each_metric():
    stats = AcceptanceStats()
    stats.update(np.array([1, 2, 4, 4]), drafted=3, emitted=np.array([1, 2, 4, 2]))
    assert (stats.steps, stats.drafted, stats.accepted, stats.emitted) == (4, 12, 7, 9)
    assert stats.accepted_per_drafted == 7 / 12
    assert stats.mean_accepted_length == 1 + 7 / 4
    assert stats.emitted_per_step == 9 / 4
    assert stats.per_position == [3 / 4, 2 / 4, 2 / 4]
    assert stats.conditional == [3 / 4, 2 / 3, 2 / 2]
    assert all(type(x) is int for x in (stats.steps, stats.accepted, *stats.accepted_at))


def test_stats_with_mixed_depths_idle_rows_and_merge():
    a, b = AcceptanceStats(), AcceptanceStats()
    a.update(
        jnp.array([3, 1, 0]), drafted=np.array([2, 0, 5]), active=np.array([True, True, False])
    )
    assert (a.steps, a.drafted, a.accepted) == (2, 2, 2)
    assert a.per_position == [1, 1] and a.conditional == [1, 1]
    b.update(np.array([1, 2]), drafted=1)
    a.merge(b)
    assert a.per_position == [2 / 3, 1] and a.conditional == [2 / 3, 1] and a.steps == 4
    assert math.isnan(AcceptanceStats().accepted_per_drafted)


@pytest.mark.parametrize("alpha,want", [(0.51, [1.51, 1.77, 1.90]), (0.85, [1.85, 2.57, 3.19])])
def test_conditional_rates_give_the_mean_length(alpha, want):
    """E[length] = 1 + sum_k prod alpha: the table of the specification, from counts of that law."""
    for m, length in enumerate(want, 1):
        law = enum.length_law(np.full((1, m), alpha), "rejection")[0]
        counts = np.repeat(np.arange(1, m + 2), np.round(law * 100_000).astype(int))
        stats = AcceptanceStats()
        stats.update(counts, drafted=m)
        assert stats.mean_accepted_length == pytest.approx(length, abs=0.006)
        assert stats.conditional == pytest.approx([alpha] * m, abs=1e-3)


@pytest.mark.parametrize(
    "count,kwargs,match",
    [
        ([4], {"drafted": 2}, "1 to drafted"),
        ([0], {"drafted": 2}, "active"),
        ([2], {"drafted": 2, "emitted": [3]}, "truncate_at_eos"),
    ],
)
def test_stats_refuse_impossible_counts(count, kwargs, match):
    with pytest.raises(ValueError, match=match):
        AcceptanceStats().update(np.array(count), **kwargs)
