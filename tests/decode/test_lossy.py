"""The lossy rules against loops over single rows, and how far they move the law of the text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode import acceptance, lossy
from dskjax.decode.phase import ThinkIds, thinking_after, thinking_slots
from dskjax.decode.sampling import sample
from dskjax.decode.synthetic import SyntheticAcceptance, accept_synthetic
from tests.oracles import enumeration as enum

typical = jax.jit(lossy.typical)
relaxed = jax.jit(lossy.relaxed)
lenient = jax.jit(lossy.lenient)
B, M, X = 400, 3, 6
OPEN, CLOSE = 4, 5


def random_step(seed, m=M):
    """(logits, p, drafts, q, u_accept, u_final) in float64; drafts drawn from q, some missing."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((B, m + 1, X))
    p = enum.softmax(logits)
    p[: B // 4] = np.where(p[: B // 4] < 0.1, 0, p[: B // 4])
    p /= p.sum(-1, keepdims=True)
    q = enum.softmax(np.log(enum.softmax(logits[:, :m])) + rng.standard_normal((B, m, X)))
    drafts = (q.cumsum(-1) > rng.random((B, m, 1))).argmax(-1).astype(np.int32)
    drafts[rng.random((B, m)) < 0.05] = -1
    return logits, p, drafts, q, rng.random((B, m)), rng.random((B, m + 1))


def run(rule, *args, **kwargs):
    """The rule in float64; tokens and counts as lists."""
    with jax.enable_x64(True):
        out = rule(*map(jnp.asarray, args), **{k: jnp.asarray(v) for k, v in kwargs.items()})
    assert out.tokens.dtype == out.count.dtype == jnp.int32
    return np.asarray(out.tokens), np.asarray(out.count)


def check(got, want):
    """`want` is a list of tokens a row."""
    tokens, count = got
    assert count.tolist() == [len(row) for row in want]
    assert len(set(count.tolist())) == tokens.shape[1]  # every length is among the cases
    for have, row in zip(tokens, want, strict=True):
        assert have.tolist() == row + [0] * (len(have) - len(row))


def draw(law, u):
    """Inverse CDF in a loop."""
    reached = 0.0
    for token, mass in enumerate(law):
        reached += mass / sum(law)
        if mass > 0 and u < reached:
            return token
    return int(np.flatnonzero(law)[-1])


# ------------------------------------------------------------------ typical


def typical_tokens(p, eps, delta):
    entropy = -sum(x * np.log(x) for x in p if x > 0)
    return [x for x in range(X) if p[x] > min(eps, delta * np.exp(-entropy)) or p[x] == max(p)]


def test_typical_equals_the_oracle():
    _, p, drafts, _, _, u_final = random_step(0)
    rng = np.random.default_rng(1)
    eps, delta = rng.uniform(0, 0.4, B), rng.uniform(0, 1, B)
    want = []
    for b in range(B):
        row = []
        for slot in range(M + 1):
            good = typical_tokens(p[b, slot], eps[b], delta[b])
            if slot < M and drafts[b, slot] in good:
                row.append(int(drafts[b, slot]))
                continue
            law = [p[b, slot, x] if x in good else 0 for x in range(X)]
            row.append(draw(law, u_final[b, slot]))
            break
        want.append(row)
    check(run(typical, p, drafts, u_final, eps=eps, delta=delta), want)


def test_typical_always_has_a_token():
    """delta = 1 and a flat law: nothing lies above the threshold, so the likeliest ones count."""
    p = jnp.full((1, 2, 4), 0.25)
    one = jnp.ones(1)
    assert lossy.typical_mask(p, eps=one, delta=one).all()
    out = typical(p, jnp.array([[2]]), jnp.array([[0.1, 0.9]]), eps=one, delta=one)
    assert out.tokens.tolist() == [[2, 3]]


def first_token_law(rule, p, q, cells_of, accept_at):
    """Law of the first token of a step with one draft, by cells of the uniforms; p, q are [X]."""
    law = np.zeros(X)
    for draft in np.flatnonzero(q):
        h = accept_at(draft)
        for u_accept, volume in ((h / 2, h), ((1 + h) / 2, 1 - h)):
            middles, sizes = enum.cells(cells_of)
            for u_final, size in zip(middles, sizes, strict=True):
                u = ([[u_accept]], [[u_final, 0.5]])
                tokens, _ = rule([[p, p]], np.array([[draft]], np.int32), [[q]], *u)
                law[tokens[0, 0]] += q[draft] * volume * size
    return law


def test_typical_moves_the_law():
    """With the published defaults the rare tokens are gone, and what is drafted weighs more."""
    p = np.array([0.45, 0.25, 0.15, 0.08, 0.05, 0.02])
    q = np.array([0.30, 0.30, 0.20, 0.10, 0.05, 0.05])
    good = typical_tokens(p, 0.09, 0.3)
    cut = np.where(np.isin(np.arange(X), good), p, 0)

    def rule(p, drafts, q, u_accept, u_final):
        return run(typical, p, drafts, u_final, eps=[0.09], delta=[0.3])

    law = first_token_law(rule, p, q, cut / cut.sum(), lambda draft: 0.5)
    want = np.where(cut > 0, q, 0) + q[cut == 0].sum() * cut / cut.sum()
    np.testing.assert_allclose(law, want, atol=1e-12)
    assert law.sum() == pytest.approx(1) and 0 < cut.astype(bool).sum() < X
    assert 0.05 < enum.total_variation(law, p) < 0.5


# ------------------------------------------------------------------ relaxed


def candidates(logits, top_n, delta):
    probs = enum.softmax(logits)
    order = sorted(range(X), key=lambda x: (-logits[x], x))[:top_n]
    return [x for x in order if probs[x] >= probs.max() - delta]


def test_relaxed_equals_the_oracle():
    """Ties in the logits included; the phase turns at the markers inside the step."""
    logits, _, drafts, _, _, _ = random_step(2)
    logits = np.round(logits)
    rng = np.random.default_rng(3)
    top_n, delta = rng.integers(1, 5, B).astype(np.int32), rng.uniform(0, 0.8, B)
    thinking = rng.random(B) < 0.5
    flips, want = 0, []
    for b in range(B):
        row, inside = [], thinking[b]
        for slot in range(M + 1):
            best = int(np.argmax(logits[b, slot]))
            good = candidates(logits[b, slot], top_n[b], delta[b]) if inside else [best]
            if slot < M and drafts[b, slot] in good:
                row.append(int(drafts[b, slot]))
                turned = inside
                turned = True if row[-1] == OPEN else False if row[-1] == CLOSE else inside
                flips += turned != inside
                inside = turned
                continue
            row.append(best)
            break
        want.append(row)
    assert flips > 20
    slots = thinking_slots(jnp.asarray(thinking), jnp.asarray(drafts), ThinkIds(OPEN, CLOSE))
    check(run(relaxed, logits, drafts, slots, top_n=top_n, delta=delta), want)


def test_relaxed_at_a_marker():
    """A draft that only the thinking forgives: kept before `</think>`, dropped right after it."""
    near = np.log([0.5, 0.45, 0.01, 0.01, 0.01, 0.02])
    close = np.log([0.45, 0.04, 0.01, 0.01, 0.01, 0.48])
    options = {"top_n": jnp.array([2]), "delta": jnp.array([0.2])}
    ids = ThinkIds(OPEN, CLOSE)

    def emitted(laws, drafts, inside):
        slots = thinking_slots(jnp.array([inside]), jnp.array([drafts]), ids)
        out = relaxed(
            jnp.asarray(np.array([laws]), jnp.float32), jnp.array([drafts]), slots, **options
        )
        return out.tokens[0, : int(out.count[0])].tolist()

    assert emitted([near, near, near], [1, 1], True) == [1, 1, 0]
    assert emitted([near, near, near], [1, 1], False) == [0]
    assert emitted([close, near, near], [CLOSE, 1], True) == [CLOSE, 0]
    assert emitted([near, close, near], [1, 0], True) == [1, 0, 0]
    begin = np.log([0.2, 0.2, 0.02, 0.03, 0.5, 0.05])
    assert emitted([begin, near, near], [OPEN, 1], False) == [OPEN, 1, 0]


# ------------------------------------------------------------------ lenient


def test_lenient_equals_the_oracle():
    _, p, drafts, q, u_accept, u_final = random_step(4)
    rng = np.random.default_rng(5)
    lenience, slots = rng.uniform(0.2, 1, B), rng.random((B, M + 1)) < 0.6
    q = np.where((drafts >= 0)[..., None], q, 0)
    want = []
    for b in range(B):
        row = []
        for slot in range(M + 1):
            draft = drafts[b, slot] if slot < M else -1
            scale = lenience[b] if slots[b, slot] else 1
            if draft >= 0 and u_accept[b, slot] < p[b, slot, draft] / (scale * q[b, slot, draft]):
                row.append(int(draft))
                continue
            law = p[b, slot]
            if slot < M:
                law = np.maximum(law - q[b, slot], 0)
            row.append(draw(law, u_final[b, slot]))
            break
        want.append(row)
    check(run(lenient, p, drafts, q, u_accept, u_final, slots, lenience=lenience), want)


def test_lenience_of_one_is_rejection():
    _, p, drafts, q, u_accept, u_final = random_step(6)
    q = np.where((drafts >= 0)[..., None], q, 0)
    want = run(jax.jit(acceptance.rejection), p, drafts, q, u_accept, u_final)
    for slots, lenience in ((True, 1.0), (False, 0.3)):
        inside = np.full((B, M + 1), slots)
        every = np.full(B, lenience)
        got = run(lenient, p, drafts, q, u_accept, u_final, inside, lenience=every)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("lenience", [0.9, 0.7, 0.5])
def test_lenient_stays_within_its_bound(lenience):
    """TV of a token's law is positive, at most sum min(q, p/l) - min(q, p), and so at most 1 - l.

    The law is measured by running the rule in every cell of its uniforms.
    """
    rng = np.random.default_rng(7)
    found = []
    for _ in range(12):
        p, q = enum.softmax(1.5 * rng.standard_normal((2, X)))
        h = np.minimum(p / (lenience * q), 1)
        excess = np.maximum(p - q, 0)
        mid, size = enum.cells(excess / excess.sum())
        passes, draft, token = (a.ravel() for a in np.indices((2, X, X)))
        n = len(draft)
        u_accept = np.where(passes, h[draft] / 2, (1 + h[draft]) / 2)[:, None]
        volume = np.where(passes, h[draft], 1 - h[draft]) * q[draft] * size[token]
        tokens, _ = run(
            lenient,
            np.tile(p, (n, 2, 1)),
            draft[:, None].astype(np.int32),
            np.tile(q, (n, 1, 1)),
            u_accept,
            np.stack([mid[token], np.full(n, 0.5)], axis=1),
            np.ones((n, 2), bool),
            lenience=np.full(n, lenience),
        )
        law = np.bincount(tokens[:, 0], volume, minlength=X)
        assert law.sum() == pytest.approx(1, abs=1e-12)
        moved = enum.total_variation(law, p)
        bound = (np.minimum(q, p / lenience) - np.minimum(q, p)).sum()
        assert moved <= bound + 1e-12 and bound <= 1 - lenience + 1e-12
        found.append(moved)
    assert min(found) > 1e-3


# ------------------------------------------------------------------ phases


@pytest.mark.parametrize(
    ("thinking", "tokens", "want"),
    [
        (False, [1, 2, 3], [False, False, False, False]),
        (True, [1, 2, 3], [True, True, True, True]),
        (True, [1, CLOSE, 3], [True, True, False, False]),
        (False, [OPEN, 2, CLOSE], [False, True, True, False]),
        (True, [CLOSE, OPEN, 0], [True, False, True, True]),
        (False, [CLOSE, -1, OPEN], [False, False, False, True]),
    ],
)
def test_phase_of_slots_and_after(thinking, tokens, want):
    ids = ThinkIds(OPEN, CLOSE)
    row, start = jnp.array([tokens]), jnp.array([thinking])
    assert thinking_slots(start, row, ids)[0].tolist() == want
    after = [bool(thinking_after(start, row, jnp.array([n]), ids)[0]) for n in range(4)]
    assert after == want  # tokens beyond the count do not count


def test_phase_without_markers():
    tokens = jnp.array([[OPEN, CLOSE]])
    for ids, want in ((ThinkIds(), [True] * 3), (ThinkIds(OPEN, None), [True] * 3)):
        assert thinking_slots(jnp.array([True]), tokens, ids)[0].tolist() == want
    assert thinking_slots(jnp.array([True]), tokens[:, :0], ThinkIds(OPEN, CLOSE)).tolist() == [
        [True]
    ]
    with pytest.raises(ValueError, match="both 4"):
        ThinkIds(4, 4)


# ------------------------------------------------------------------ synthetic


def test_synthetic_rates_are_met():
    rates = SyntheticAcceptance((0.8, 0.5, 0.1)).rates
    n = 1000
    rng = np.random.default_rng(8)
    u = np.tile((np.arange(n)[:, None] + 0.5) / n, (1, 3))
    p = enum.softmax(rng.standard_normal((n, 4, X))).astype(np.float32)
    u_final = rng.random((n, 4)).astype(np.float32)
    drafts = rng.integers(0, X, (n, 3)).astype(np.int32)
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    run = jax.jit(accept_synthetic, static_argnums=4)
    out = run(drafts, f32(p), f32(u), f32(u_final), rates)
    tokens, accepted = np.asarray(out.tokens), np.asarray(out.count) - 1
    assert [(accepted > i).mean() for i in range(3)] == [0.8, 0.5, 0.1]
    own = np.asarray(sample(f32(p), f32(u_final)))
    for b in range(n):
        k = accepted[b]
        want = [*drafts[b, :k], own[b, k], *[0] * (3 - k)]
        assert tokens[b].tolist() == want
    missing = run(jnp.asarray(drafts).at[:, 1].set(-1), f32(p), f32(u), f32(u_final), rates)
    assert (np.asarray(missing.count) == np.minimum(accepted, 1) + 1).all()
    none = run(jnp.zeros((n, 0), jnp.int32), f32(p[:, :1]), f32(u[:, :0]), f32(u_final[:, :1]), ())
    assert none.tokens[:, 0].tolist() == own[:, 0].tolist() and (none.count == 1).all()


@pytest.mark.parametrize(("mean", "m"), [(1.0, 2), (1.7, 1), (2.2, 3), (4.0, 3), (1.0, 0)])
def test_synthetic_from_mean_length(mean, m):
    rates = SyntheticAcceptance.from_mean_length(mean, m).rates
    assert len(rates) == m and 1 + sum(rates) == pytest.approx(mean, abs=1e-12)
    ratios = [b / a for a, b in zip((1.0, *rates), rates, strict=False) if a]
    assert ratios == pytest.approx(ratios[:1] * len(ratios))


def test_synthetic_refuses():
    with pytest.raises(ValueError, match="must not rise"):
        SyntheticAcceptance((0.5, 0.6))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        SyntheticAcceptance((1.5,))
    with pytest.raises(ValueError, match=r"mean=3.5 must be in \[1, 3\]"):
        SyntheticAcceptance.from_mean_length(3.5, 2)
    with pytest.raises(ValueError, match="1 synthetic rates for 2 drafts"):
        ones = jnp.ones((1, 3, 4)), jnp.zeros((1, 2)), jnp.zeros((1, 3))
        accept_synthetic(jnp.zeros((1, 2), jnp.int32), *ones, (0.5,))
