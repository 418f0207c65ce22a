"""The whole model: `apply` == float64 oracle; `forward` over pages, in any chunks == `apply`.

The pool starts full of NaN, its pages lie in random order, unused table entries are garbage ids,
and padding rows carry an embedding of NaN.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskjax import model
from dskjax.batch import RaggedBatch, plan_batch
from dskjax.layers.mla import Mla
from pallas_kernels import dequantise, quantise
from pallas_kernels.quant import FP8_TILE
from pallas_kernels.testing import assert_close, assert_equal, jit
from pallas_kernels.testing.compare import cosine_distance
from tests.model.common import (
    LENS,
    Pages,
    oracle,
    ragged,
    run_forward,
    run_forward_mtp,
    run_head,
    run_mtp_chain,
    run_trunk,
    tiny,
)
from tests.oracles import deepseek
from tests.tolerances import MODEL

NAMES = ["tiny-v3", "tiny-v2", "tiny-v2lite", "tiny-kimi"]
ROWS = 12  # static rows of a step; mixed steps have 6 absorbed ones before them


def full(name):
    """`trunk` of all sequences at once: the yardstick of `forward`."""
    return run_trunk(tiny(name))


# ------------------------------------------------------------------ against the oracle


def check_trunk(name, params=None):
    t = tiny(name)
    out = run_trunk(t, params=params)
    logits = run_head(t, out.hidden)
    assert logits.dtype == jnp.float32
    for b, (hidden, layers, experts, _) in enumerate(oracle(name)):
        for i, layer in enumerate(layers):
            assert_close(out.layers[i, b], layer, MODEL, f"layer {i}")
        for i, chosen in enumerate(experts):
            assert_equal(np.sort(out.experts[i, b]), np.sort(chosen), f"experts {i}")
        assert_close(out.hidden[b], hidden, MODEL, "hidden")
        assert_close(logits[b], deepseek.head(t.raw, hidden), MODEL, "logits")


@pytest.mark.parametrize("name", NAMES)
def test_trunk_matches_oracle(name):
    check_trunk(name)


def check_mtp_chain(params=None, hidden=None):
    t, out = tiny(), full("tiny-v3")
    chain = run_mtp_chain(t.cfg)(
        t.params if params is None else params,
        jnp.asarray(t.tokens),
        out.hidden if hidden is None else hidden(out),
    )
    for b, (_, _, _, want) in enumerate(oracle()):
        for k, h in enumerate(want):
            assert_close(chain.hidden[k][b, : len(h)], h, MODEL, f"h^{k + 1}")


def test_mtp_chain_matches_oracle():
    check_mtp_chain()


def test_more_depths_than_modules_are_refused():
    t = tiny()
    with pytest.raises(ValueError, match="depths=3 but the model has 2"):
        model.mtp_chain(
            t.params, jnp.asarray(t.tokens), full("tiny-v3").hidden, cfg=t.cfg, depths=3
        )


def test_packed_documents_do_not_see_each_other():
    """Two documents in a row, with positions that start again, equal the documents alone."""
    t, lens = tiny(), (7, 6)
    tokens, segments, positions = (np.zeros((3, 17), np.int32) for _ in range(3))
    for b in range(3):
        start = 0
        for s, length in enumerate(lens):
            at = slice(start, start + length)
            tokens[b, at], segments[b, at] = t.tokens[(b + s) % 3, :length], s + 1
            positions[b, at] = np.arange(length)
            start += length
    got = run_trunk(t, tokens, segments, positions).hidden
    want = full("tiny-v3").hidden
    for b in range(3):
        assert_close(got[b, :7], want[b, :7], MODEL)
        assert_close(got[b, 7:13], want[(b + 1) % 3, :6], MODEL)


@pytest.mark.parametrize("bad", [256, 1_000_000])
def test_ids_outside_the_vocabulary_give_nan(bad):
    rows = model.embed(tiny().params, jnp.asarray([3, bad]))
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()


# ------------------------------------------------------------------ chunks over the paged cache


def run_step(t, pages, done, new, form, impl="auto"):
    """One step of new[b] tokens; returns (rows of each sequence, new pages)."""
    if form == "mixed":  # short chunks absorbed, long ones expanded
        short = [n if n <= 2 else 0 for n in new]
        parts = (
            ragged(pages, t.tokens, done, short, 6, "absorbed"),
            ragged(
                pages,
                t.tokens,
                done,
                [n - s for n, s in zip(new, short, strict=True)],
                ROWS,
                "expanded",
            ),
        )
        hidden, cache = run_forward(t.cfg, impl)(t.params, pages.cache, parts)
        spans = [(0, short), (6, [n - s for n, s in zip(new, short, strict=True)])]
    else:
        batch = ragged(pages, t.tokens, done, new, ROWS, form)
        hidden, cache = run_forward(t.cfg, impl)(t.params, pages.cache, batch)
        spans = [(0, new)]
    rows = [None] * len(new)
    for start, counts in spans:
        for b, n in enumerate(counts):
            if n:
                rows[b] = np.asarray(hidden[start : start + n])
            start += n
    return rows, dataclasses.replace(pages, cache=cache)


def check_chunks(name, steps, seed=0, impl="auto", want=None, **options):
    """`steps`: (form, wanted new tokens of each sequence); every emitted row equals `apply`'s."""
    t, want = tiny(name), full(name).hidden if want is None else want
    pages, done = Pages.make(t.cfg, seed, **options), [0, 0, 0]
    for form, wanted in steps:
        new = [min(n, length - d) for n, length, d in zip(wanted, LENS, done, strict=True)]
        rows, pages = run_step(t, pages, done, new, form, impl)
        for b, n in enumerate(new):
            if n:
                assert_close(rows[b], want[b, done[b] : done[b] + n], MODEL, f"sequence {b}")
        done = [d + n for d, n in zip(done, new, strict=True)]
    for layer in range(t.cfg.num_hidden_layers):
        np.testing.assert_array_equal(pages.written(layer), pages.expected(done))
    return done


FORMS = ["absorbed", "expanded", "mixed"]
PREFILL_THEN_DECODE = [("expanded", (4, 4, 4)), ("expanded", (7, 0, 5)), ("expanded", (0, 2, 7))]
PREFILL_THEN_DECODE += [("absorbed", (1, 1, 1)), ("absorbed", (2, 2, 0))]
MIXED = [("mixed", (6, 1, 5)), ("mixed", (2, 8, 2)), ("mixed", (1, 0, 9)), ("mixed", (5, 0, 1))]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("tiny-v3", PREFILL_THEN_DECODE),
        ("tiny-v3", MIXED),
        ("tiny-v2lite", MIXED),
    ],
    ids=["v3 in turn", "v3 mixed", "v2-lite mixed"],
)
def test_prefill_and_decode_equal_one_pass(name, steps):
    assert check_chunks(name, steps) == list(LENS)


def test_xla_prefill_and_decode_equal_one_pass():
    check_chunks("tiny-v3", MIXED, impl="xla")


@settings(max_examples=12)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(FORMS), st.tuples(*[st.integers(0, 4)] * 3)),
        min_size=3,
        max_size=9,
    ),
    seed=st.integers(0, 5),
)
def test_any_chunking(steps, seed):
    check_chunks("tiny-v3", steps, seed)


def test_uniform_batches():
    """The same number of rows for every sequence, as decode and verification have it."""
    t, want = tiny(), full("tiny-v3").hidden
    pages = Pages.make(t.cfg)
    for at, form in ((0, "expanded"), (3, "absorbed"), (6, "absorbed")):
        batch = RaggedBatch.uniform(
            jnp.asarray(t.tokens[:, at : at + 3]),
            jnp.asarray(pages.table),
            jnp.full(3, at + 3, jnp.int32),
            form,
        )
        hidden, pages.cache = run_forward(t.cfg)(t.params, pages.cache, batch)
        assert_close(hidden.reshape(3, 3, -1), want[:, at : at + 3], MODEL)


def test_rejected_rows_are_written_over():
    """After wrong drafts the lengths go back, and the right tokens take their slots."""
    t, want = tiny(), full("tiny-v3").hidden
    wrong = dataclasses.replace(t, tokens=(t.tokens + 1) % 256)
    _, pages = run_step(t, Pages.make(t.cfg), [0, 0, 0], [4, 4, 4], "expanded")
    _, pages = run_step(wrong, pages, [4, 4, 4], [3, 3, 3], "absorbed")
    rows, _ = run_step(t, pages, [4, 4, 4], [3, 2, 3], "absorbed")
    for b, n in enumerate((3, 2, 3)):
        assert_close(rows[b], want[b, 4 : 4 + n], MODEL)


def check_idle(form, length=0):
    """Sequences of length 0 with rows all the same: nothing of the pool changes."""
    t, pages = tiny(), Pages.make(tiny().cfg)
    before = jax.tree.map(np.array, pages.cache)
    # No NaN in padding here: it would hide rows that are written to a wrong place.
    batch = ragged(pages, t.tokens, [0, 0, 0], [3, 3, 3], ROWS, form, poison_id=5)
    batch = dataclasses.replace(batch, cached_lens=jnp.full(3, length, jnp.int32))
    _, cache = run_forward(t.cfg)(t.params, pages.cache, batch)
    jax.tree.map(assert_equal, cache, before)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_idle_rows_write_nothing(form):
    check_idle(form)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_rows_past_the_table_are_dropped(form):
    """A table of 6 pages has room for 24 tokens: of rows 22 to 25 two are written, two dropped."""
    t, pages = tiny(), Pages.make(tiny().cfg, lens=(24, 24, 12))
    batch = ragged(pages, t.tokens, [0, 0, 0], [4, 0, 0], ROWS, form)
    batch = dataclasses.replace(batch, cached_lens=jnp.asarray([26, 0, 0], jnp.int32))
    _, pages.cache = run_forward(t.cfg)(t.params, pages.cache, batch)
    want = np.zeros_like(pages.written())
    want[pages.table[0, 5], 2:] = True
    np.testing.assert_array_equal(pages.written(), want)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_positions_pages_and_slots(form):
    batch = RaggedBatch(
        token_ids=jnp.zeros(7, jnp.int32),
        page_table=jnp.asarray([[5, 9], [7, -1], [8, 3]], jnp.int32),
        cached_lens=jnp.asarray([6, 1, 9], jnp.int32),
        query_starts=jnp.asarray([0, 3, 5, 6], jnp.int32),
        form=form,
    )
    plan = plan_batch(batch, 4)
    np.testing.assert_array_equal(plan.positions, [3, 4, 5, 0, 0, 8, 0])
    np.testing.assert_array_equal(plan.pages, [5, 9, 9, -1, 7, -1, -1])
    np.testing.assert_array_equal(plan.slots, [3, 0, 1, 0, 0, 0, 0])
    assert (plan.prefill is None) == (form == "absorbed")


# ------------------------------------------------------------------ donation, fp8


def test_the_cache_is_updated_in_place():
    t, pages = tiny(), Pages.make(tiny().cfg)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(pages.cache)]
    batch = ragged(pages, t.tokens, [0, 0, 0], [4, 4, 4], ROWS, "absorbed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "some donated buffers were not usable"
        _, cache = run_forward(t.cfg)(t.params, pages.cache, batch)
    assert pages.cache.latent.is_deleted() and pages.cache.rope.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] == pointers


def test_fp8_cache_equals_rounding_each_latent_once(monkeypatch):
    """Chunks over an fp8 cache equal one pass in which every latent went through e4m3."""
    project, plain = Mla.project, full("tiny-v3").hidden

    def rounded(self, *args, **kwargs):
        p = project(self, *args, **kwargs)
        stored = jax.lax.optimization_barrier(quantise(p.latent, FP8_TILE))  # else never rounded
        return dataclasses.replace(p, latent=dequantise(stored))

    t = tiny()
    monkeypatch.setattr(Mla, "project", rounded)
    run = jit(lambda p, tok: model.trunk(p, tok, cfg=t.cfg))
    want = run(t.params, jnp.asarray(t.tokens))
    monkeypatch.undo()
    check_chunks("tiny-v3", MIXED, want=want.hidden, kv_dtype="fp8")
    assert 1e-3 < cosine_distance(*map(np.float64, (plain, want.hidden))) < 0.1


# ------------------------------------------------------------------ MTP over the cache


def mtp_rows(chunks, form="absorbed", change=None):
    """h^1 and h^2 of sequence 2 over the cache, in chunks, each depth fed by the one before.

    `change(depth, chunk, following ids, hidden)` plants mistakes in what a module is given.
    """
    t, n = tiny(), LENS[2]
    pages, tokens = Pages.make(t.cfg, seed=1), np.zeros((3, 17), np.int32)
    hidden, out = np.asarray(full("tiny-v3").hidden[2]), []
    for k in (1, 2):
        rows, done = [], 0
        for chunk in chunks:
            new = min(chunk, n - k - done)
            following = t.tokens[2, done + k : done + k + new]
            given = hidden[done : done + new]
            if change is not None:
                following, given = change(k, done, following, given)
            tokens[2, done : done + new] = following
            batch = ragged(pages, tokens, [0, 0, done], [0, 0, new], ROWS, form)
            padded = np.full((ROWS, hidden.shape[1]), np.nan, np.float32)
            padded[:new] = given
            h, pages.cache = run_forward_mtp(t.cfg)(
                t.params, pages.cache, batch, jnp.asarray(padded), jnp.int32(k - 1)
            )
            rows.append(np.asarray(h[:new]))
            done += new
        hidden = np.concatenate(rows)
        out.append(hidden)
        layer = t.cfg.num_hidden_layers + k - 1
        np.testing.assert_array_equal(pages.written(layer), pages.expected([0, 0, n - k]))
        assert not pages.written(layer - k).any(), "the trunk's layers are not touched"
    return out


def check_mtp_rows(chunks, form="absorbed", change=None):
    for got, want in zip(mtp_rows(chunks, form, change), oracle()[2][3], strict=True):
        assert_close(got, want, MODEL)


CHUNKS = (6, 1, 1, 5, 3)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_mtp_over_the_cache_equals_the_chain(form):
    check_mtp_rows(CHUNKS, form)
