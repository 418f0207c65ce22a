"""Rows of different rules in one batch; the hybrid rule keeps the law at any draft temperature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode import acceptance, lossy
from dskjax.decode.rules import (
    RULE_NAMES,
    RuleOptions,
    RuleRows,
    ThinkIds,
    accept_rows,
    draft_sampling,
    overlap,
    thinking_slots,
)
from dskjax.decode.sampling import SamplingParams, distribution, sample
from tests.oracles import enumeration as enum

TV_EXACT = 1e-12  # float64 sums of a few thousand terms
TV_BROKEN = 1e-3
THINK = ThinkIds(5, 6)
X = 7
full = pytest.mark.full
accept = jax.jit(accept_rows, static_argnames=("think", "names"))
law_of = jax.jit(distribution)
draw_with = jax.jit(draft_sampling, static_argnums=2)
SINGLE = {name: jax.jit(rule) for name, rule in acceptance.RULES.items()}
SINGLE |= {name: jax.jit(getattr(lossy, name)) for name in ("typical", "relaxed", "lenient")}


def options(text, **fields):
    return dataclasses.replace(RuleOptions.parse(text), **fields)


# ------------------------------------------------------------------ hybrid H1 by enumeration


def tables(name, vocab, m):
    """(target laws, drafter's logits) by prefix."""
    rng = np.random.default_rng([vocab, m])
    target = enum.random_logits(rng, vocab, 2 * m)
    logits = [t + rng.standard_normal(t.shape) for t in target]
    p = [enum.softmax(t) for t in target]
    if name == "top_p":
        p = [
            np.stack([enum.truncated_distribution(row, 0.8, top_p=0.7) for row in table])
            for table in target
        ]
    if name == "zeros":
        for table in p:
            table[rng.random(table.shape) < 0.35] = 0
            table[table.sum(-1) == 0, 0] = 1
            table /= table.sum(-1, keepdims=True)
        logits = [np.where(rng.random(t.shape) < 0.25, -np.inf, t) for t in logits]
        for table in logits:
            table[np.isinf(table).all(-1), 1] = 0
    return p, logits


def drafted(rows, logits, rule, scale, top_k=0):
    """Gives the rows the q of the hybrid rule: each depth at its own temperature, by our code."""
    n, m = rows.drafts.shape
    raw = rows.gather(logits, m)
    first = enum.softmax(raw[:, 0])
    entropy = -np.sum(np.where(first > 0, first * np.log(np.where(first > 0, first, 1)), 0), -1)
    sampling = SamplingParams.make(n, temperature=0.9, top_k=top_k)
    q = []
    with jax.enable_x64(True):
        for depth in range(m):
            params = draw_with(
                RuleRows.make(n, rule), sampling, depth, jnp.asarray(entropy, jnp.float32), scale
            )
            q.append(np.asarray(law_of(jnp.asarray(raw[:, depth]), params)))
            assert len(np.unique(params.temperature)) > 1 or not rule.draft_b
    rows.q = np.stack(q, axis=1)
    assert rows.q.dtype == np.float64
    rows.weight = enum.at_drafts(rows.q, rows.drafts).prod(axis=1)
    return rows


def run_step(rows, rule, *, q=None, thinking=False, think=THINK, kind="block"):
    """The jitted batch rule in every cell of its uniforms: chain rows of emissions."""
    index, u_accept, u_final, weight = enum.drive(rows, kind, np.random.default_rng(7))
    n = len(index)
    with jax.enable_x64(True):
        out = accept(
            RuleRows.make(n, rule),
            jnp.zeros(rows.p[index].shape),
            jnp.asarray(rows.p[index]),
            jnp.asarray(rows.drafts[index], jnp.int32),
            jnp.asarray((rows.q if q is None else q)[index]),
            jnp.asarray(u_accept),
            jnp.asarray(u_final),
            jnp.full(n, thinking),
            think=think,
        )
    return (
        rows.start[index],
        rows.context[index],
        np.asarray(out.tokens),
        np.asarray(out.count),
        weight,
    )


def tv(p, rows, outcomes):
    m, vocab = rows.drafts.shape[1], rows.p.shape[-1]
    law = enum.chain_law(*outcomes, vocab=vocab, length=m + 1)
    assert law.sum() == pytest.approx(1, abs=1e-9)
    return enum.total_variation(law, enum.target_law(p, m + 1))


SCALES = [(0.8, 0.05, (1.0, 1.0, 1.0)), (0.4, 0.7, (0.6, 1.3, 2.0))]
MODELS = [
    pytest.param(model, vocab, m, *scale, marks=() if quick else full)
    for model in ("random", "zeros", "top_p")
    for vocab, m, quick in ((4, 2, True), (3, 3, model == "random"))
    for scale, quick in ((SCALES[0], False), (SCALES[1], quick))
]


@pytest.mark.parametrize(("model", "vocab", "m", "a", "b", "scale"), MODELS)
def test_hybrid_is_lossless_at_any_draft_temperature(model, vocab, m, a, b, scale):
    p, logits = tables(model, vocab, m)
    rule = RuleOptions(name="hybrid", draft_a=a, draft_b=b)
    scale = jnp.asarray(scale[:m], jnp.float32)
    rows = drafted(enum.step_rows(p, p, m), logits, rule, scale, top_k=2 if model == "top_p" else 0)
    assert tv(p, rows, run_step(rows, rule)) < TV_EXACT


@pytest.mark.parametrize("wrong", ["temperature", "depths"])
def test_hybrid_with_the_wrong_q_is_seen(wrong):
    """The q of the test has to be the drawn one: not that of temperature 1, nor a neighbour's."""
    p, logits = tables("random", 4, 2)
    rule = RuleOptions(name="hybrid", draft_a=0.4, draft_b=0.1)
    rows = drafted(enum.step_rows(p, p, 2), logits, rule, jnp.ones(2))
    assert tv(p, rows, run_step(rows, rule)) < TV_EXACT
    q = enum.softmax(rows.gather(logits, 2)) if wrong == "temperature" else rows.q[:, ::-1]
    assert tv(p, rows, run_step(rows, rule, q=q)) > TV_BROKEN


def one_step_tv(p, rows, outcomes):
    """Distance of one step from the empty prefix, the target itself going on after it."""
    start, _, tokens, count, weight = outcomes
    m, vocab = rows.drafts.shape[1], rows.p.shape[-1]
    reach = [np.zeros(vocab**s) for s in range(m + 2)]
    for row, n, mass in zip(tokens[start == 0], count[start == 0], weight[start == 0], strict=True):
        code = functools.reduce(lambda c, token: c * vocab + token, row[:n], 0)
        reach[n][code] += mass
    for s in range(m + 1):
        reach[s + 1] += (reach[s][:, None] * p[s]).ravel()
    return enum.total_variation(reach[m + 1], enum.target_law(p, m + 1))


def test_lenient_hybrid_is_lossless_outside_thinking():
    """A row that begins outside keeps the law to the step's end, though its drafts may open it."""
    p, logits = tables("random", 4, 2)
    rule = RuleOptions(name="hybrid", lenience=0.5)
    rows = drafted(enum.step_rows(p, p, 2), logits, rule, jnp.ones(2))
    outcomes = run_step(rows, rule, think=ThinkIds(1, 2))
    assert one_step_tv(p, rows, outcomes) < TV_EXACT
    wrong = run_step(rows, rule, think=ThinkIds(1, 2), q=rows.q[:, ::-1])
    assert one_step_tv(p, rows, wrong) > TV_BROKEN


# ------------------------------------------------------------------ mixed batches

MIX = [
    options("strict"),
    options("rejection"),
    options("block"),
    options("typical"),
    options("typical:eps=0.3,delta=0.9"),
    options("relaxed"),
    options("relaxed:top_n=2,delta=0.2"),
    options("hybrid"),
    options("hybrid:lenience=0.6"),
    options("hybrid:lenience=0.3"),
]
B, M = 40 * len(MIX), 3


@functools.cache
def random_step(greedy=False):
    """(raw_logits, p, drafts, q, u_accept, u_final, thinking), f32; row b has rule b % len(MIX)."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(1.5 * rng.standard_normal((B, M + 1, X)), jnp.float32)
    p = law_of(logits, SamplingParams.make(B, temperature=0.0 if greedy else 0.8, top_p=0.95))
    near = logits[:, :M] + jnp.asarray(rng.standard_normal((B, M, X)), jnp.float32)
    q = law_of(near, SamplingParams.make(B, temperature=0.0 if greedy else 0.6))
    u = jnp.asarray(rng.random((B, 3 * M + 1)), jnp.float32)
    drafts = sample(q, u[:, :M])
    thinking = jnp.asarray(rng.random(B) < 0.5)
    return logits, p, drafts, q, u[:, M : 2 * M], u[:, 2 * M :], thinking


def rules_of(batch):
    return [MIX[b % len(MIX)] for b in range(batch)]


def same(got, want, rows=slice(None)):
    got, want = jax.device_get((got, want))
    np.testing.assert_array_equal(got.tokens[rows], want.tokens[rows])
    np.testing.assert_array_equal(got.count[rows], want.count[rows])


def test_mixed_batch_equals_the_single_rules():
    raw, p, drafts, q, u_accept, u_final, thinking = random_step()
    out = accept(RuleRows.make(B, rules_of(B)), *random_step(), think=THINK)
    assert out.tokens.dtype == out.count.dtype == jnp.int32
    slots = thinking_slots(thinking, drafts, THINK)
    assert (slots != thinking[:, None]).any()  # phases turn inside the step
    for k, rule in enumerate(MIX):
        mine = np.arange(k, B, len(MIX))
        full = functools.partial(jnp.full, B)
        match rule.name:
            case "typical":
                eps, delta = full(rule.typical_eps), full(rule.typical_delta)
                want = SINGLE["typical"](p, drafts, u_final, eps=eps, delta=delta)
            case "relaxed":
                top_n, delta = full(rule.relaxed_top_n), full(rule.relaxed_delta)
                want = SINGLE["relaxed"](raw, drafts, slots, top_n=top_n, delta=delta)
            case "hybrid":
                want = SINGLE["block"](p, drafts, q, u_accept, u_final)
                if rule.lenience < 1:
                    inside = mine[np.asarray(thinking)[mine]]
                    mine = mine[~np.asarray(thinking)[mine]]
                    tests = (p, drafts, q, u_accept, u_final, slots)
                    loose = jax.device_get(SINGLE["lenient"](*tests, lenience=full(rule.lenience)))
                    same(out, loose, inside)
                    assert (loose.tokens != np.asarray(want.tokens))[inside].any()
            case name:
                want = SINGLE[name](p, drafts, q, u_accept, u_final)
        same(out, want, mine)
        assert len(np.unique(np.asarray(want.count)[mine])) > 1


def test_a_row_does_not_depend_on_its_neighbours():
    args = random_step()
    mixed = accept(RuleRows.make(B, rules_of(B)), *args, think=THINK)
    for k, rule in enumerate(MIX):
        alone = accept(RuleRows.make(B, rule), *args, think=THINK)
        same(mixed, alone, np.arange(k, B, len(MIX)))


@pytest.mark.parametrize(
    "names",
    [pytest.param(("strict",), marks=full), ("hybrid",), ("relaxed", "block")],
)
def test_rules_left_out_change_nothing(names):
    rules = [rule for rule in MIX if rule.name in names]
    rows = RuleRows.make(B, [rules[b % len(rules)] for b in range(B)])
    same(
        accept(rows, *random_step(), think=THINK, names=names),
        accept(rows, *random_step(), think=THINK),
    )


@pytest.mark.parametrize("name", ["rejection", "block", "hybrid", "typical"])
def test_greedy_rows_are_strict(name):
    args = random_step(greedy=True)
    want = accept(RuleRows.make(B, options("strict")), *args, think=THINK)
    assert len(np.unique(want.count)) == M + 1
    same(accept(RuleRows.make(B, options(name)), *args, think=THINK), want)
    # Even if a drafter drew from a law of its own.
    spread = (*args[:3], random_step()[3], *args[4:])
    same(accept(RuleRows.make(B, options(name)), *spread, think=THINK), want)


def test_relaxed_outside_thinking_is_greedy():
    args = (*random_step(greedy=True)[:-1], jnp.zeros(B, bool))
    strict = accept(RuleRows.make(B, options("strict")), *args, think=ThinkIds())
    got = accept(RuleRows.make(B, options("relaxed")), *args, think=ThinkIds())
    same(got, strict)
    inside = (*args[:-1], jnp.ones(B, bool))
    loose = accept(RuleRows.make(B, options("relaxed")), *inside, think=ThinkIds())
    assert (loose.count >= strict.count).all() and (loose.count > strict.count).any()


@pytest.mark.parametrize("k", [0, pytest.param(1, marks=full), 2])
def test_missing_drafts_shorten_the_step(k):
    """From the first -1 on there is no draft, whatever q (NaN here) and later slots hold."""
    raw, p, drafts, q, u_accept, u_final, thinking = random_step()
    rows = RuleRows.make(B, rules_of(B))
    short = (raw[:, : k + 1], p[:, : k + 1], drafts[:, :k], q[:, :k], u_accept[:, :k])
    want = accept(rows, *short, u_final[:, : k + 1], thinking, think=THINK)
    holes = drafts.at[:, k].set(-1), q.at[:, k:].set(jnp.nan)
    got = accept(rows, raw, p, *holes, u_accept, u_final, thinking, think=THINK)
    np.testing.assert_array_equal(got.tokens[:, : k + 1], want.tokens)
    np.testing.assert_array_equal(got.count, want.count)
    if k == 0:  # without drafts the lossless rules are plain sampling
        plain = np.array([rule.lossless for rule in rules_of(B)])
        own = np.asarray(sample(p[:, 0], u_final[:, 0]))
        np.testing.assert_array_equal(np.asarray(got.tokens)[plain, 0], own[plain])


def test_absent_q_means_argmax_drafts():
    args = random_step()
    one_hot = jax.nn.one_hot(args[2], X, dtype=jnp.float32)
    rows = RuleRows.make(B, rules_of(B))
    want = accept(rows, *args[:3], one_hot, *args[4:], think=THINK)
    same(accept(rows, *args[:3], None, *args[4:], think=THINK), want)


def test_misfits_are_named():
    args = random_step()
    rows = RuleRows.make(B, options("strict"))
    with pytest.raises(ValueError, match=r"unknown rules \['no'\]; choose of strict"):
        accept_rows(rows, *args, think=THINK, names=("no",))
    with pytest.raises(ValueError, match="2 rules for batch=3 rows"):
        RuleRows.make(3, [options("strict")] * 2)


# ------------------------------------------------------------------ rows, drafts, overlap


def test_rows_hold_what_row_says():
    rows = RuleRows.make(len(MIX), MIX)
    fields = [field.name for field in dataclasses.fields(RuleRows)]
    for b, rule in enumerate(MIX):
        row = rule.row()
        assert list(row) == fields and RULE_NAMES[row["rule"]] == rule.name
        for name, value in row.items():
            column = getattr(rows, name)
            assert column.shape == (len(MIX),) and column.dtype == value.dtype
            assert column[b] == value
    assert RuleRows.make(0, MIX[0]).rule.shape == (0,)
    assert jax.tree.map(lambda x: x[:2], rows).lenience.shape == (2,)


def test_what_drafts_are_drawn_with():
    rules = ["strict", "typical", "relaxed", "rejection", "block", "hybrid", "hybrid", "hybrid"]
    rows = RuleRows.make(8, [options(name) for name in rules])
    sampling = SamplingParams.make(
        8, temperature=[0.7] * 5 + [0.7, 0.0, 3.0], top_k=list(range(8)), top_p=0.9, seed=3
    )
    entropy = jnp.asarray([0.0] * 5 + [2.0, 2.0, 1.0])
    out = draw_with(rows, sampling, 1, entropy, jnp.array([9.0, 1.2]))
    want = [0, 0, 0, 0.7, 0.7, 0.7 * 1.2 * (0.8 + 0.05 * 2), 0, 2.0]  # the last one is clipped
    np.testing.assert_allclose(out.temperature, want, rtol=1e-6)
    assert out.top_k.tolist() == list(range(8)) and (out.top_p == sampling.top_p).all()
    assert (out.seed == 3).all()
    traced = jax.jit(draft_sampling)(rows, sampling, jnp.int32(1), entropy, jnp.array([9.0, 1.2]))
    np.testing.assert_array_equal(traced.temperature, out.temperature)


def test_overlap_is_the_acceptance_of_rejection():
    _, p, drafts, q, *_ = random_step()
    got = overlap(p, q)
    want = [[1 - enum.total_variation(p[b, i], q[b, i]) for i in range(M)] for b in range(B)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert overlap(p[:, :1], q[:, :0]).shape == (B, 0)
