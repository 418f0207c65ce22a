"""The rules follow the target law with real uniforms, through the whole jitted path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dskjax.decode import acceptance
from dskjax.decode.acceptance import LOSSLESS, RULES
from dskjax.decode.sampling import (
    SamplingParams,
    Use,
    distribution,
    sample,
    uniforms,
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
