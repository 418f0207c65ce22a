"""The loss against NumPy in float64, by loops over documents; the model is replaced by a table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.config import MtpConfig
from dskjax.model import MtpOutput, TrunkOutput
from tests.train_mtp import toy
from train_mtp import loss
from train_mtp.data import Batch

LAYERS, DEPTHS = 3, 2
CFG = dataclasses.replace(toy.model(), mtp=MtpConfig(num_nextn_predict_layers=DEPTHS))
BATCH = toy.batch(rows=4, columns=11)
SHAPE = BATCH.tokens.shape


def rng(seed=0):
    return np.random.default_rng(seed)


HIDDEN = rng(1).normal(size=(1 + DEPTHS, *SHAPE, CFG.hidden_size)).astype(np.float32)
EXPERTS = rng(2).integers(0, 8, size=(LAYERS + DEPTHS, *SHAPE, 2)).astype(np.int32)
HEAD = rng(3).normal(size=(CFG.vocab_size, CFG.hidden_size)).astype(np.float32)


@pytest.fixture
def stub(monkeypatch):
    """Replaces trunk and MTP chain; `loss_sums` then sees HIDDEN and EXPERTS."""
    hidden, experts = map(jnp.asarray, (HIDDEN, EXPERTS))

    def trunk(params, tokens, **_):
        return TrunkOutput(hidden[0], experts[:LAYERS], None, hidden[0])

    def mtp_chain(params, tokens, h, *, depths, **_):
        assert h is hidden[0] or (h == hidden[0]).all()
        return MtpOutput(list(hidden[1:]), list(experts[LAYERS:]))

    monkeypatch.setattr(loss, "trunk", trunk)
    monkeypatch.setattr(loss, "mtp_chain", mtp_chain)
    monkeypatch.setattr(loss, "cast", lambda params, specs, dtype: params)
    return lambda batch=BATCH: loss.loss_sums(
        {"lm_head": {"weight": jnp.asarray(HEAD)}},
        jax.tree.map(jnp.asarray, batch),
        cfg=CFG,
        dtype=jnp.float32,
    )


def anchors(depth: int, batch: Batch):
    """(row, anchor, label) of every token that this depth should predict, document by document."""
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            (places,) = np.nonzero(batch.segment_ids[row] == segment)
            for place in places:
                if place + depth + 1 <= places[-1]:
                    yield row, place, batch.tokens[row, place + depth + 1]


def log_softmax(hidden):
    logits = hidden.astype(np.float64) @ HEAD.astype(np.float64).T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_against_numpy(sums):
    for depth in range(1 + DEPTHS):
        found = list(anchors(depth, BATCH))
        logp = log_softmax(HIDDEN[depth])
        trunk_best = log_softmax(HIDDEN[0]).argmax(-1)
        nats = -sum(logp[row, at, label] for row, at, label in found)
        assert sums.tokens[depth] == len(found)
        np.testing.assert_allclose(sums.nats[depth], nats, rtol=1e-6)
        best = logp.argmax(-1)
        assert sums.top1[depth] == sum(best[r, i] == label for r, i, label in found)
        assert sums.agree[depth] == sum(best[r, i] == trunk_best[r, i + depth] for r, i, _ in found)


def test_sums_equal_numpy(stub):
    check_against_numpy(stub())


@pytest.mark.parametrize("name", ["late", "early", "not masked", "padding", "anchor masked"])
def test_comparison_sees_a_planted_mistake(stub, monkeypatch, name):
    right = loss.labels_at

    def wrong(depth, tokens, segment_ids, scored):
        assert scored is None
        if name == "late":
            return right(depth + 1, tokens, segment_ids)
        if name == "early":
            return loss.Labels(jnp.roll(tokens, -depth, axis=1), right(depth, *args).valid)
        ids = right(depth, tokens, segment_ids).ids
        if name == "not masked":  # document borders are forgotten
            return loss.Labels(ids, loss.shift_left(segment_ids, depth + 1) > 0)
        if name == "padding":  # segment 0 counts as a document
            return right(depth, tokens, segment_ids + 1)
        return loss.Labels(ids, segment_ids > 0)  # masked at the anchor instead of the label

    args = (jnp.asarray(BATCH.tokens), jnp.asarray(BATCH.segment_ids))
    monkeypatch.setattr(loss, "labels_at", wrong)
    with pytest.raises(AssertionError):
        check_against_numpy(stub())


def test_five_tokens_by_hand():
    tokens, segments = jnp.array([[5, 6, 7, 8, 9]]), jnp.array([[1, 1, 1, 2, 2]])
    first, second = (loss.labels_at(k, tokens, segments) for k in (0, 1))
    assert first.valid.tolist() == [[True, True, False, True, False]]
    assert second.valid.tolist() == [[True, False, False, False, False]]
    assert first.ids[first.valid].tolist() == [6, 7, 9] and second.ids[second.valid].tolist() == [7]
    assert not loss.labels_at(9, tokens, segments).valid.any()  # deeper than the row


def test_a_segment_number_that_returns_is_another_document():
    tokens = jnp.array([[5, 6, 7, 8]])
    at = loss.labels_at(1, tokens, jnp.array([[1, 2, 1, 1]]))
    assert not at.valid.any()


def test_expert_loads_leave_out_padding_and_invalid_anchors(stub):
    loads = stub().loads
    real = BATCH.segment_ids > 0
    for layer in range(LAYERS):
        expected = np.bincount(EXPERTS[layer][real].ravel(), minlength=8)
        np.testing.assert_array_equal(loads["moe_layers"][layer], expected)
    for depth in range(1, DEPTHS + 1):
        where = tuple(np.array([(row, at) for row, at, _ in anchors(depth, BATCH)]).T)
        expected = np.bincount(EXPERTS[LAYERS + depth - 1][where].ravel(), minlength=8)
        np.testing.assert_array_equal(loads["mtp_layers"][depth - 1], expected)


def test_total_is_v3s_formula_with_each_depth_over_its_own_count(stub):
    sums = stub()
    each = [float(sums.nats[k]) / len(list(anchors(k, BATCH))) for k in range(1 + DEPTHS)]
    total = loss.total_loss(sums, mtp_weight=0.3)
    np.testing.assert_allclose(total, each[0] + 0.3 / 2 * (each[1] + each[2]), rtol=1e-6)
    plain = loss.total_loss(sums, mtp_weight=0.0, z_loss=0.01)
    lse = np.log(np.exp(HIDDEN[0].astype(np.float64) @ HEAD.T.astype(np.float64)).sum(-1))
    valid = tuple(np.array([(row, at) for row, at, _ in anchors(0, BATCH)]).T)
    np.testing.assert_allclose(plain, each[0] + 0.01 * np.mean(lse[valid] ** 2), rtol=1e-5)


def test_batch_of_padding_gives_zero_not_nan(stub):
    sums = stub(jax.tree.map(np.zeros_like, BATCH))
    assert sums.tokens.tolist() == [0, 0, 0]
    assert float(loss.total_loss(sums, mtp_weight=0.3, z_loss=0.1)) == 0


@pytest.mark.parametrize("columns", [1, 4, 11, 99])
def test_chunked_head_has_the_plain_values_and_gradients(columns):
    labels = jnp.asarray(BATCH.tokens)
    weigh = jnp.asarray(rng(4).normal(size=(2, *SHAPE)), jnp.float32)

    def plain(hidden, weight):
        logits = jnp.einsum("bsd,xd->bsx", hidden, weight)
        lse = jax.nn.logsumexp(logits, axis=-1)
        at = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return lse - at, lse, logits.argmax(-1)

    def objective(run):
        def of(hidden, weight):
            nats, lse, best = run(hidden, weight)
            return (weigh[0] * nats + weigh[1] * lse).sum(), (nats, lse, best)

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)

    args = jnp.asarray(HIDDEN[0]), jnp.asarray(HEAD)
    with jax.default_matmul_precision("highest"):
        expected = objective(plain)(*args)
        found = objective(lambda h, w: loss.head_loss(h, w, labels, columns))(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )


def test_head_gradient_is_summed_in_fp32():
    """Thousands of equal bf16 terms: a bf16 sum would stop growing at 256 of them."""
    tokens = 4096
    hidden = jnp.ones((1, tokens, 1), jnp.bfloat16)
    labels = jnp.zeros((1, tokens), jnp.int32)
    of = lambda w: loss.head_loss(hidden, w, labels, 8).nats.sum()  # noqa: E731
    grad = jax.grad(of)(jnp.zeros((2, 1), jnp.float32))
    assert grad.ravel().tolist() == [-tokens / 2, tokens / 2]


def test_chunks_bound_the_logits():
    columns = loss.columns_at_once(128, 6144)
    assert columns * 128 * 6144 * 4 <= loss.CHUNK_BYTES < (columns + 1) * 128 * 6144 * 4
    assert loss.columns_at_once(10**6, 10**6) == 1


def test_of_equally_likely_tokens_the_lowest_id_is_best():
    weight = np.zeros((9, 4), np.float32)
    weight[[3, 7]] = 1.0
    hidden = jnp.stack([jnp.ones((3, 4)), -jnp.ones((3, 4))])  # 3 and 7 first, all others first
    found = loss.head_loss(hidden, jnp.asarray(weight), jnp.zeros((2, 3), jnp.int32), 2)
    np.testing.assert_array_equal(found.best, [[3] * 3, [0] * 3])
