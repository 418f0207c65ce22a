"""Drafts over the paged cache against the definition: every module run over whole sequences.

Verification hides a wrong draft, so drafts are compared themselves, step after step, including the
rows that earlier wrong drafts left in the cache.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import attention, model
from dskjax.decode import RuleOptions, SamplingParams, draft
from dskjax.decode.generate import prefill_prompts
from dskjax.decode.slots import RowOptions
from dskjax.decode.step import DecodeConfig, step
from dskjax.layers.rope import rope_tables
from dskjax.mtp import MtpModule
from dskjax.params import bind, unstack
from tests.decode.toy import PROMPTS, toy

STEPS = 6
LONGEST = 48
full = pytest.mark.full


def chained(params, cfg, tokens, drafts):
    """Scheme A by definition: depth k over the known tokens and the drafts so far."""
    known = list(tokens)
    row = jnp.zeros((1, LONGEST), jnp.int32).at[0, : len(known)].set(jnp.asarray(known))
    hidden = _trunk(params, cfg)(row)
    out = []
    for k in range(drafts):
        chain = _chain(params, cfg, k + 1)(row, hidden)
        out.append(int(model.head(params, chain[0, len(known) - 2], cfg=cfg).argmax()))
        row = row.at[0, len(known) + k].set(out[-1])
    return out


def recycled(params, cfg, tokens, drafts):
    """Scheme C by definition: one causal sequence of (hidden, token) rows, own outputs appended."""
    n = len(tokens)
    row = jnp.zeros((1, LONGEST), jnp.int32).at[0, :n].set(jnp.asarray(tokens))
    hidden = _trunk(params, cfg)(row)[0]
    following = jnp.roll(row[0], -1)
    out = []
    for k in range(drafts):
        h = _rows(params, cfg)(following, hidden)
        out.append(int(model.head(params, h[n - 2 + k], cfg=cfg).argmax()))
        hidden = hidden.at[n - 1 + k].set(h[n - 2 + k])
        following = following.at[n - 1 + k].set(out[-1])
    return out


_COMPILED = {}


def _trunk(params, cfg):
    run = lambda row: model.trunk(params, row, cfg=cfg).hidden  # noqa: E731
    return _COMPILED.setdefault(("trunk", cfg), jax.jit(run))


def _chain(params, cfg, depths):
    run = lambda row, hidden: (  # noqa: E731
        model.mtp_chain(params, row, hidden, cfg=cfg, depths=depths).hidden[-1]
    )
    return _COMPILED.setdefault(("chain", cfg, depths), jax.jit(run))


def _rows(params, cfg):
    def run(following, hidden):
        positions = jnp.arange(LONGEST, dtype=jnp.int32)[None]
        tables = rope_tables(positions[0], cfg.mla.qk_rope_head_dim, cfg.rope)
        plan = model.sequence_plan(jnp.ones_like(positions), positions)
        attend = attention.over_sequences(tables, plan, cfg, "reference")
        weights = jax.tree.map(lambda w: w[0], params["mtp_layers"])
        module = bind(MtpModule, weights, cfg)
        return module(model.embed(params, following), hidden, attend, impl="reference")[0]

    return _COMPILED.setdefault(("rows", cfg), jax.jit(run))


@functools.cache
def compiled_step(cfg, config):
    """One program for all who take this step."""
    return jax.jit(functools.partial(step, cfg=cfg, config=config))


def check(modules, drafts, pause=-1, unroll=False):
    """Runs decode steps and compares all drafts on the table after each of them; step `pause` runs
    without drafts.
    """
    params, cfg = toy(modules)
    expected = recycled if cfg.mtp.scheme == "recycled" else chained
    config = DecodeConfig.make(cfg, accept=("strict",), drafts=drafts)
    # Hot sampling: the text differs from the drafts often, and every acceptance length occurs.
    sampling = SamplingParams.make(len(PROMPTS), temperature=1.5, seed=[1, 2, 3])
    options = RowOptions.make(sampling, accept=RuleOptions(name="strict"), drafts=drafts)
    state, rows, _ = prefill_prompts(
        params, cfg, PROMPTS, config, options, max_tokens=30, page_size=5, chunk=8
    )
    served = unstack(params) if unroll else params
    fewest = config.fewer(0)  # a step that drafts nothing must keep the modules' rows all the same
    run = {c: compiled_step(cfg, c) for c in (config, fewest)}
    known, lengths, compared = [list(p) for p in PROMPTS], set(), 0
    for number in range(STEPS):
        for index, tokens in enumerate(known):
            found = np.asarray(state.drafts[index]).tolist()
            if number in (0, pause + 1):
                assert found == [-1] * drafts, "nothing was drafted"
            else:
                assert found == expected(params, cfg, tokens, drafts), f"after {tokens}"
                compared += 1
        state, out = run[fewest if number == pause else config](served, state, rows, None)
        for index, tokens in enumerate(known):
            count = int(out.count[index])
            lengths.add(count)
            tokens.extend(np.asarray(out.tokens[index, :count]).tolist())
    assert compared > STEPS
    assert len(lengths) > 1, "every step emitted the same number of tokens: too easy"


@pytest.mark.parametrize(
    ("modules", "drafts"),
    [pytest.param(1, 1, marks=full), (1, 3), pytest.param(3, 3, marks=full), (3, 2)],
)
def test_drafts_are_those_of_the_definition(modules, drafts):
    check(modules, drafts)


@pytest.mark.parametrize(("modules", "drafts"), [pytest.param(1, 3, marks=full), (3, 3)])
def test_unstacked_weights_draft_the_same(modules, drafts):
    check(modules, drafts, pause=3, unroll=True)


@pytest.mark.parametrize(("modules", "drafts"), [(1, 3), pytest.param(3, 3, marks=full)])
def test_a_step_without_drafts_keeps_the_modules_up_to_date(modules, drafts):
    check(modules, drafts, pause=2)


def trace_again(monkeypatch):
    """What is patched is in the programs from here on, and in none after the test."""
    module = sys.modules["dskjax.decode.generate"]
    monkeypatch.setattr(module, "program", module.program.__wrapped__)
    monkeypatch.setattr(sys.modules[__name__], "compiled_step", compiled_step.__wrapped__)


def test_sees_draft_rows_that_are_not_overwritten(monkeypatch):
    real = draft.forward_mtp

    def keeps_old_rows(params, cache, batch, hidden, **kwargs):
        h, new = real(params, cache, batch, hidden, **kwargs)
        written = jnp.any(cache.latent != 0, axis=-1, keepdims=True)
        keep = lambda old, fresh: jnp.where(written, old, fresh)  # noqa: E731
        return h, jax.tree.map(keep, cache, new)

    monkeypatch.setattr(draft, "forward_mtp", keeps_old_rows)
    trace_again(monkeypatch)
    with pytest.raises(AssertionError):
        check(1, 3)


@pytest.mark.parametrize("modules", [pytest.param(1, marks=full), 3])
def test_sees_the_following_token_off_by_one(monkeypatch, modules):
    real = draft.forward_mtp

    def shifted(params, cache, batch, hidden, **kwargs):
        late = jnp.roll(batch.token_ids, 1)
        batch = type(batch)(
            late, batch.page_table, batch.cached_lens, batch.query_starts, batch.form, batch.queries
        )
        return real(params, cache, batch, hidden, **kwargs)

    monkeypatch.setattr(draft, "forward_mtp", shifted)
    trace_again(monkeypatch)
    with pytest.raises(AssertionError):
        check(modules, 2)
