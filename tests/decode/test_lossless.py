"""The acceptance rules are lossless: proved by enumeration, and the proof sees planted bugs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode import acceptance
from dskjax.decode.acceptance import LOSSLESS, RULES
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
