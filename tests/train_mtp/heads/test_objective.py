"""The objective of a depth against NumPy, on laws small enough to write out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_mtp import loss as trunk_loss
from train_mtp.heads.objective import Objective, depth_loss
from train_mtp.heads.teacher import teach

B, S, D, X = 2, 7, 8, 24
TEMPERATURES = (0.7, 1.0, 0.3)
RNG = np.random.default_rng(5)
TRUNK, HEAD = (RNG.normal(size=(B, S, D)).astype(np.float32) for _ in range(2))
WEIGHT = RNG.normal(size=(X, D)).astype(np.float32)
LABELS = RNG.integers(0, X, (B, S)).astype(np.int32)
TERMS = ("loss", "ce", "kl", "alpha")


def log_softmax(z):
    z = z.astype(np.float64)
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def by_hand(objective, top_k):
    """The terms, in float64; a tail of everything but the trunk's `top_k` is one token."""
    z_p, z_q = TRUNK @ WEIGHT.T, HEAD @ WEIGHT.T
    keep = np.argsort(-z_p, axis=-1, kind="stable")[..., :top_k]

    def law(z, t):
        probs = np.exp(log_softmax(z / t))
        kept = np.take_along_axis(probs, keep, -1)
        if top_k == X:
            return kept
        rest = 1 - kept.sum(-1, keepdims=True)
        return np.concatenate([kept, rest], -1)

    ce = -np.take_along_axis(log_softmax(z_q), LABELS[..., None], -1)[..., 0]
    alpha = np.stack([np.minimum(law(z_p, t), law(z_q, t)).sum(-1) for t in TEMPERATURES])
    p, q = law(z_p, TEMPERATURES[0]), law(z_q, TEMPERATURES[0])
    kl = (p * np.log(p / q)).sum(-1)
    share = np.exp(-objective.kl_decay * alpha[0]) if objective.kl_decay else 1.0
    rest = 1 - share if objective.kl_decay else 1.0
    total = objective.ce * ce + objective.kl * share * kl
    total += objective.lk * -np.log(alpha[0]) + objective.tv * rest * (1 - alpha[0])
    return dict(zip(TERMS, (total, ce, kl, alpha), strict=True))


@functools.cache
def run(objective, top_k, ahead=0):
    @jax.jit
    def both(hidden):
        weight, labels = jnp.asarray(WEIGHT), jnp.asarray(LABELS)
        law = teach(jnp.asarray(TRUNK), weight, top_k=top_k, temperatures=TEMPERATURES)
        return depth_loss(
            hidden, weight, labels, law.ahead(ahead), objective, temperatures=TEMPERATURES
        )

    return both


OBJECTIVES = {
    "ce": Objective(ce=1.0, kl=0.0, temperature=0.7),
    "kl": Objective(ce=0.0, kl=1.0, temperature=0.7),
    "lk": Objective(ce=0.0, kl=0.0, lk=1.0, temperature=0.7),
    "all": Objective(ce=0.2, kl=0.5, lk=0.3, tv=0.7, temperature=0.7),
    "handed over": Objective(ce=0.1, kl=1.0, tv=1.0, kl_decay=3.0, temperature=0.7),
}


@pytest.mark.parametrize("top_k", [5, X, 999])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_equal_numpy(name, top_k):
    found = run(OBJECTIVES[name], top_k)(jnp.asarray(HEAD))
    # The tail is 1 minus an fp32 sum: 1e-7 of a tail of 1e-4 or more.
    rtol = 5e-4 if top_k < X else 2e-5
    for term, want in by_hand(OBJECTIVES[name], min(top_k, X)).items():
        np.testing.assert_allclose(getattr(found, term), want, rtol=rtol, atol=5e-6, err_msg=term)
    assert np.array_equal(found.best, (HEAD @ WEIGHT.T).argmax(-1))


def test_teachers_row_is_the_one_ahead():
    shifted = run(OBJECTIVES["kl"], X, ahead=2)(jnp.asarray(HEAD))
    z_p, z_q = TRUNK @ WEIGHT.T / 0.7, HEAD @ WEIGHT.T / 0.7
    p, q = log_softmax(z_p), log_softmax(z_q)
    for by, agrees in ((2, True), (1, False), (3, False)):
        n = S - 3
        want = (np.exp(p[:, by : by + n]) * (p[:, by : by + n] - q[:, :n])).sum(-1)
        assert np.allclose(shifted.kl[:, :n], want, rtol=1e-4, atol=1e-5) == agrees, by


@pytest.mark.parametrize("name", ["all", "handed over"])
def test_gradient_equals_that_of_whole_logits(name):
    objective = OBJECTIVES[name]

    def plain(hidden):
        z_p, z_q = TRUNK @ WEIGHT.T, hidden @ WEIGHT.T
        ce = -jnp.take_along_axis(jax.nn.log_softmax(z_q), LABELS[..., None], -1).sum()
        p = jax.nn.log_softmax(z_p / 0.7)
        q = jax.nn.log_softmax(z_q / 0.7)
        alpha = jnp.exp(jnp.minimum(p, q)).sum(-1)
        share, rest = 1.0, 1.0
        if objective.kl_decay:
            share = jnp.exp(-objective.kl_decay * jax.lax.stop_gradient(alpha))
            rest = 1 - share
        kl = (share * (jnp.exp(p) * (p - q)).sum(-1)).sum()
        total = objective.ce * ce + objective.kl * kl - objective.lk * jnp.log(alpha).sum()
        return total + objective.tv * (rest * (1 - alpha)).sum()

    want = jax.grad(plain)(jnp.asarray(HEAD))
    found = jax.grad(lambda h: run(objective, X)(h).loss.sum())(jnp.asarray(HEAD))
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-5)


def test_chunks_change_nothing(monkeypatch):
    whole = run(OBJECTIVES["all"], X)(jnp.asarray(HEAD))
    monkeypatch.setattr(trunk_loss, "CHUNK_BYTES", 4 * B * X * 3)  # 3 columns at a time
    parts = run.__wrapped__(OBJECTIVES["all"], X)(jnp.asarray(HEAD))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def test_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(trunk_loss, "CHUNK_BYTES", 4 * B * X)  # one column
    step = jax.grad(lambda h: run.__wrapped__(OBJECTIVES["all"], 5)(h).loss.sum())
    text = str(jax.make_jaxpr(step)(jnp.asarray(HEAD)))
    assert f"f32[{B},1,{X}]" in text
    assert f"f32[{B},{S},{X}]" not in text and f"f32[{S},{B},1,{X}]" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ce": 0.0, "kl": 0.0}, "nor all 0"),
        ({"kl": -1.0}, "must not be negative"),
        ({"kl_decay": -1.0, "tv": 1.0}, "kl_decay=-1.0"),
        ({"kl_decay": 1.0}, "give both a weight"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_bad_objectives_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Objective(), **changes)
