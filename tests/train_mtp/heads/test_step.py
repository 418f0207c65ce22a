"""Losses by depth, masks, and one update of heads over a frozen trunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dskjax import quantise
from dskjax.mesh import make_mesh, preset
from dskjax.model import head, mtp_chain, trunk
from dskjax.params import named_leaves
from dskjax.recycled import mtp_recycled
from pallas_kernels import QTensor
from tests.train_mtp.heads.toy import TRUNK, batch, frozen, recipe, state, taught
from tests.train_mtp.toy import quick_compiler
from train_mtp.data import Batch
from train_mtp.heads import step as step_module
from train_mtp.heads import sums as sums_module
from train_mtp.heads.start import first_weights
from train_mtp.heads.step import accumulated_step, head_step
from train_mtp.heads.sums import head_metrics, head_sums
from train_mtp.state import TrainState, abstract_state, state_shardings

KINDS = ("independent", "shared")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_compiler():
        yield


@functools.cache
def _compiled(of):
    return jax.jit(functools.partial(head_sums, recipe=of))


def sums_of(of, weights, rows):
    return _compiled(of)(weights, frozen(), rows, taught(of, rows))


@functools.cache
def _laws(of):
    """Compiled: (heads, tokens) -> logarithms of the laws of the trunk and of each depth."""
    run = mtp_chain if of.weights == "independent" else mtp_recycled

    def laws(heads, tokens):
        hidden = trunk(frozen(), tokens, cfg=of.cfg).hidden
        out = run(frozen() | heads, tokens, hidden, cfg=of.cfg, depths=of.depths).hidden
        return [jax.nn.log_softmax(head(frozen(), h, cfg=of.cfg))[0] for h in (hidden, *out)]

    return jax.jit(laws)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("weights", KINDS)
def test_each_depth_by_hand_on_five_tokens(weights):
    """[7 8 9 10 11]: depth 1 has anchors 0..2, depth 2 has 0..1, depth 3 has anchor 0 alone."""
    of = recipe(weights, depths=3)
    tokens = np.array([[7, 8, 9, 10, 11]], np.int32)
    rows = Batch(tokens, np.ones_like(tokens), np.arange(5, dtype=np.int32)[None])
    heads = state(of).params
    found = sums_of(of, heads, rows)
    law, *drafted = map(np.asarray, _laws(of)(heads, tokens))
    for k, q in enumerate(drafted, start=1):
        anchors = range(5 - 1 - k)
        assert int(found.tokens[k - 1]) == len(anchors)
        ce = -sum(q[i, tokens[0, i + k + 1]] for i in anchors)
        agree = sum(q[i].argmax() == law[i + k].argmax() for i in anchors)
        assert float(found.ce[k - 1]) == pytest.approx(ce, rel=1e-4)
        assert int(found.agree[k - 1]) == agree
        # Of 64 tokens 16 are kept: the rest is one token for both.
        keep = [np.argsort(-law[i + k], kind="stable")[:16] for i in anchors]
        kl = alpha = 0.0
        for i, ids in zip(anchors, keep, strict=True):
            p, r = (np.append(np.exp(x[ids]), 1 - np.exp(x[ids]).sum()) for x in (law[i + k], q[i]))
            kl, alpha = kl + (p * np.log(p / r)).sum(), alpha + np.minimum(p, r).sum()
        assert float(found.kl[k - 1]) == pytest.approx(kl, rel=1e-3)
        assert float(found.alpha[0, k - 1]) == pytest.approx(alpha, rel=1e-4)


def test_sees_a_teacher_that_is_off_by_one(monkeypatch):
    right = sums_module.Teacher.ahead
    monkeypatch.setattr(sums_module.Teacher, "ahead", lambda self, by: right(self, by - 1))
    _compiled.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_each_depth_by_hand_on_five_tokens("independent")
    finally:
        _compiled.cache_clear()


def test_labels_that_do_not_count_are_masked_at_the_label():
    of, heads = recipe(), state(recipe()).params
    tokens = np.array([[7, 8, 9, 10, 11]], np.int32)
    rows = Batch(tokens, np.ones_like(tokens), np.arange(5, dtype=np.int32)[None])
    prompt = rows._replace(scored=np.array([[0, 0, 0, 1, 1]], np.int32))  # answer: 10 11
    found, everything = sums_of(of, heads, prompt), sums_of(of, heads, rows)
    assert everything.tokens.tolist() == [3, 2]
    assert found.tokens.tolist() == [2, 2]  # labels 10, 11 at depth 1 and at depth 2
    only_last = rows._replace(scored=np.array([[0, 0, 0, 0, 1]], np.int32))
    assert sums_of(of, heads, only_last).tokens.tolist() == [1, 1]


def test_padding_and_other_documents_do_not_matter():
    of, heads, rows = recipe("shared", depths=3), state(recipe("shared", depths=3)).params, batch()
    noise = rows._replace(tokens=np.where(rows.segment_ids > 0, rows.tokens, 9))
    for a, b in zip(sums_of(of, heads, rows), sums_of(of, heads, noise), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_shared_and_independent_heads_see_different_keys():
    """The same weights in every depth: depth 1 is the same, depth 2 is not."""
    one, two = recipe("shared"), recipe("independent")
    shared = state(one).params
    twice = jax.tree.map(lambda w: jnp.concatenate([w, w]), shared)
    rows = batch()
    a, b = sums_of(one, shared, rows), sums_of(two, twice, rows)
    assert float(a.ce[0]) == pytest.approx(float(b.ce[0]), rel=1e-5)
    assert abs(float(a.ce[1]) - float(b.ce[1])) > 1e-3 * float(a.ce[1])


def test_metrics_are_means_and_products():
    of = recipe(depths=3, watch=(0.5,))
    sums = sums_of(of, state(of).params, batch(rows=6))
    metrics = {name: np.asarray(value) for name, value in head_metrics(sums, of).items()}
    tokens = np.asarray(sums.tokens)
    assert metrics["accepted_length"] == pytest.approx(1 + (sums.agree_chain / tokens).sum())
    for t in ("1", "0.5"):
        chain = np.cumprod(metrics[f"alpha_given_t{t}"])
        assert metrics[f"accepted_length_t{t}"] == pytest.approx(1 + chain.sum(), rel=1e-5)
        assert (metrics[f"alpha_t{t}"] > 0).all() and (metrics[f"alpha_t{t}"] <= 1).all()
    assert (np.diff(np.asarray(sums.agree_chain)) <= 0).all()


def test_bfloat16_losses_are_finite_and_not_zero():
    of = recipe("shared", depths=3, precision="bfloat16")
    sums = sums_of(of, state(of).params, batch())
    for values in (sums.loss, sums.ce, sums.kl):
        assert np.isfinite(values).all() and (np.asarray(values) > 0).all()


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("weights", KINDS)
def test_only_modules_are_trained_and_all_of_them_are(weights):
    of = recipe(weights)
    before, rows = state(of), batch()
    old, kept = copy(before.params), copy(frozen())
    after, metrics = head_step(before, frozen(), rows, taught(of, rows), recipe=of)
    assert set(after.params) == {"mtp_layers"}
    names = {name for name, _ in named_leaves(after.params)}
    moments = jax.tree.leaves(optax.tree.get(after.opt_state, "mu"))
    assert len(moments) == len(names) - 1  # all but the router biases, and nothing of the trunk
    for name, leaf in named_leaves(after.params):
        assert not np.array_equal(leaf, dict(named_leaves(old))[name]), name
    jax.tree.map(np.testing.assert_array_equal, kept, frozen())
    assert np.isfinite(metrics["total_loss"]) and metrics["grad_norm"] > 0


def test_gradients_stop_between_depths_only_when_asked():
    """The first of two independent modules learns from depth 2 unless gradients are stopped."""
    rows = jax.tree.map(jnp.asarray, batch())

    def first_module(detach):
        of = recipe(depth_decay=1e-9, detach=detach)  # nothing but depth 1 ... counts
        other = dataclasses.replace(of, depth_decay=1.0)
        given = (frozen(), rows, taught(of, rows))

        def objectives(weights):
            sums = head_sums(weights, *given, recipe=of)
            return step_module.objective_of(sums, of), step_module.objective_of(sums, other)

        @jax.jit
        def slopes(weights):
            _, pull = jax.vjp(objectives, weights)
            return [pull(up)[0]["mtp_layers"]["eh_proj"][0] for up in ((1.0, 0.0), (0.0, 2.0))]

        return slopes(state(recipe()).params)

    alone, with_second = first_module(detach=True)
    np.testing.assert_allclose(with_second, alone, rtol=1e-4, atol=1e-7)
    alone, with_second = first_module(detach=False)
    assert np.abs(with_second - alone).max() > 1e-4


@pytest.mark.parametrize("weights", [pytest.param("independent", marks=pytest.mark.full), "shared"])
def test_accumulated_batches_equal_one_large_one(weights):
    of, rows = recipe(weights), batch()
    parts = jax.tree.map(lambda a: a.reshape(4, 1, *a.shape[1:]), rows)
    one, told = head_step(state(of), frozen(), rows, taught(of, rows), recipe=of)
    many, said = accumulated_step(state(of), frozen(), parts, recipe=of)
    assert float(said["total_loss"]) == pytest.approx(float(told["total_loss"]), rel=1e-5)
    assert float(said["grad_norm"]) == pytest.approx(float(told["grad_norm"]), rel=1e-4)
    for name, leaf in named_leaves(optax.tree.get(many.opt_state, "mu")):
        want = dict(named_leaves(optax.tree.get(one.opt_state, "mu")))[name]
        if leaf is not None:
            np.testing.assert_allclose(leaf, want, rtol=2e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("weights", "rules", "mesh"),
    [
        pytest.param("shared", "data", {"dp": 4}, marks=pytest.mark.full),
        pytest.param("shared", "fsdp", {"dp": 4}, marks=pytest.mark.full),
        ("independent", "train", {"dp": 2, "ep": 2}),
    ],
    ids=["data", "fsdp", "experts"],
)
def test_sharded_steps_equal_unsharded_ones(weights, rules, mesh):
    of = recipe(weights, depths=2)
    made = make_mesh(**mesh, devices=jax.devices()[:4])
    on = dataclasses.replace(of, sharding=preset(rules, made))
    rows = batch()
    one, told = head_step(state(of), frozen(), rows, taught(of, rows), recipe=of)
    many, said = head_step(state(on), frozen(), rows, taught(on, rows), recipe=on)
    assert float(said["total_loss"]) == pytest.approx(float(told["total_loss"]), rel=1e-5)
    for leaf, where in zip(
        jax.tree.leaves(many.params), jax.tree.leaves(state_shardings(on).params), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    for (name, a), (_, b) in zip(named_leaves(one.params), named_leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_quantised_trunk_stays_quantised():
    params = quantise(frozen(), "fp8")
    assert any(isinstance(leaf, QTensor) for _, leaf in named_leaves(params))
    of, rows = recipe(), batch()
    rounded = taught(of, rows, params)
    after, metrics = head_step(state(of), params, rows, rounded, recipe=of)
    assert np.isfinite(metrics["total_loss"])
    exact = taught(of, rows).hidden
    assert 1e-4 < float(jnp.abs(rounded.hidden - exact).mean() / jnp.abs(exact).mean()) < 0.3
    assert not any(isinstance(leaf, QTensor) for _, leaf in named_leaves(after.params))


# ------------------------------------------------------------------ start


def test_last_copies_the_checkpoints_module_into_every_depth():
    heads = dict(named_leaves(state(recipe(depths=3), init="last").params["mtp_layers"]))
    for name, source in named_leaves(frozen()["mtp_layers"]):
        for k in range(3):
            np.testing.assert_array_equal(heads[name][k], source[-1], err_msg=name)


def test_last_falls_back_on_the_trunks_last_layer():
    bare = {name: group for name, group in frozen().items() if name != "mtp_layers"}
    without = dataclasses.replace(TRUNK, mtp=type(TRUNK.mtp)())
    made = first_weights(bare, jax.random.key(0), trunk=without, recipe=recipe(), init="last")
    heads = made["mtp_layers"]
    np.testing.assert_array_equal(
        heads["block"]["self_attn"]["o_proj"][1], frozen()["moe_layers"]["self_attn"]["o_proj"][-1]
    )
    assert float(jnp.abs(heads["eh_proj"]).max()) > 0


def test_state_restores_into_what_abstract_state_says():
    of = recipe("shared")
    made = state(of)
    assert isinstance(made, TrainState)
    for leaf, want in zip(jax.tree.leaves(made), jax.tree.leaves(abstract_state(of)), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": 3}, "need 3 modules"),
        ({"depth_decay": 0.0}, "depth_decay"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_bad_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe(depths=2), **changes)
