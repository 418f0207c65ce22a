"""The recycled module over whole sequences against its definition: drafting, anchor by anchor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import attention, model, recycled
from dskjax.layers.rope import rope_tables
from dskjax.mtp import MtpModule
from dskjax.params import bind
from pallas_kernels.testing import assert_close
from tests.model.common import LENS, run_trunk, tiny
from tests.tolerances import MODEL

DEPTHS = 3
LENGTH = min(LENS)


@functools.cache
def _module(cfg, rows):
    def run(weights, embedded, hidden):
        at = jnp.arange(rows, dtype=jnp.int32)[None]
        tables = rope_tables(at[0], cfg.mla.qk_rope_head_dim, cfg.rope)
        plan = model.sequence_plan(jnp.ones_like(at), at)
        attend = attention.over_sequences(tables, plan, cfg, "reference")
        return bind(MtpModule, weights, cfg)(embedded, hidden, attend, impl="reference")[0]

    return jax.jit(run)


def drafted(params, cfg, tokens, hidden, anchor):
    """h^1..h^DEPTHS of one anchor as a server computes them: own outputs appended to the rows."""
    weights = jax.tree.map(lambda w: w[0], params["mtp_layers"])
    rows = LENGTH + DEPTHS
    follow = np.zeros(rows, np.int32)
    follow[: anchor + 1] = tokens[1 : anchor + 2]
    states = np.zeros((rows, cfg.hidden_size), np.float32)
    states[: anchor + 1] = hidden[: anchor + 1]
    out = []
    for k in range(DEPTHS):
        embedded = model.embed(params, jnp.asarray(follow))
        h = np.asarray(_module(cfg, rows)(weights, embedded, jnp.asarray(states)))
        out.append(h[anchor + k])
        states[anchor + k + 1] = h[anchor + k]
        follow[anchor + k + 1] = tokens[anchor + k + 2]
    return out


@functools.cache
def unrolled(detach=False):
    t = tiny()
    tokens = jnp.asarray(t.tokens[:, :LENGTH])
    hidden = run_trunk(t, tokens).hidden
    run = functools.partial(recycled.mtp_recycled, cfg=t.cfg, depths=DEPTHS, detach=detach)
    return np.asarray(hidden), jax.jit(run)(t.params, tokens, hidden)


def check(values):
    """`values`[k][b, i] are h^{k+1} of anchor i."""
    t, (hidden, _) = tiny(), unrolled()
    for b in range(len(LENS)):
        for anchor in range(LENGTH - 1 - DEPTHS):
            want = drafted(t.params, t.cfg, t.tokens[b], hidden[b], anchor)
            for k in range(DEPTHS):
                assert_close(values[k][b, anchor], want[k], MODEL, f"h^{k + 1}[{anchor}]")


def test_every_anchor_sees_what_drafting_sees():
    check(unrolled()[1].hidden)


def test_detaching_changes_no_value():
    check(unrolled(detach=True)[1].hidden)


@pytest.mark.parametrize("wrong", ["causal at every depth", "position of the anchor"])
def test_sees_another_mask_or_position(wrong, monkeypatch):
    t, (hidden, _) = tiny(), unrolled()
    if wrong == "causal at every depth":  # the mask of independent modules: other anchors' drafts
        original = recycled._recycling
        monkeypatch.setattr(
            recycled, "_recycling", lambda tables, plan, earlier, *a: original(tables, plan, [], *a)
        )
    else:
        original_tables = rope_tables
        at = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), len(LENS))
        monkeypatch.setattr(
            recycled, "rope_tables", lambda _, dim, rope: original_tables(at, dim, rope)
        )
    tokens = jnp.asarray(t.tokens[:, :LENGTH])
    out = jax.jit(functools.partial(recycled.mtp_recycled, cfg=t.cfg, depths=DEPTHS))(
        t.params, tokens, jnp.asarray(hidden)
    )
    with pytest.raises(AssertionError):
        check(out.hidden)


def test_segments_stand_alone_and_padding_spoils_no_gradient():
    t, half = tiny(), LENGTH // 2
    tokens = np.zeros((1, LENGTH + 3), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for s in range(2):
        at = slice(s * half, (s + 1) * half)
        tokens[0, at], segments[0, at] = t.tokens[s, :half], s + 1
        positions[0, at] = np.arange(half)
    given = [jnp.asarray(x) for x in (tokens, segments, positions)]
    hidden = run_trunk(t, *given).hidden

    @jax.jit
    def loss(mtp):
        out = recycled.mtp_recycled(
            t.params | {"mtp_layers": mtp},
            given[0],
            hidden,
            cfg=t.cfg,
            depths=2,
            segment_ids=given[1],
            positions=given[2],
        )
        kept = [jnp.where(given[1][..., None] > 0, h, 0) for h in out.hidden]
        return sum(jnp.square(h).sum() for h in kept), out.hidden

    grads, values = jax.jit(jax.grad(loss, has_aux=True))(t.params["mtp_layers"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    _, whole = unrolled()
    for k in range(2):
        last = half - 1 - (k + 1)  # rows past it look at tokens of the next document
        assert_close(values[k][0, :last], whole.hidden[k][0, :last], MODEL)
        assert_close(values[k][0, half : half + last], whole.hidden[k][1, :last], MODEL)


def test_gradients_pass_between_depths_unless_detached():
    t = tiny()
    tokens = jnp.asarray(t.tokens[:1, :LENGTH])
    hidden = run_trunk(t, tokens).hidden

    @functools.partial(jax.jit, static_argnames="detach")
    def pull(h, detach):
        def last(h):
            out = recycled.mtp_recycled(t.params, tokens, h, cfg=t.cfg, depths=2, detach=detach)
            return out.hidden[1][0, 2].sum()

        return jax.grad(last)(h)

    assert float(jnp.abs(pull(hidden, detach=False)).max()) > 0
    assert float(jnp.abs(pull(hidden, detach=True)).max()) == 0


def test_a_model_without_modules_is_refused():
    t = tiny("tiny-v2lite")
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        recycled.mtp_recycled(
            t.params, jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4, 64)), cfg=t.cfg, depths=1
        )
