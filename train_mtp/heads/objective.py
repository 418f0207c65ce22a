"""What a draft head is trained for, at one depth: text, the trunk's law, or acceptance itself.

Let p be the trunk's law at row i + k and q the head's at depth k, anchor i, both over token i+k+1:

    ce      -log q(token of the text)
    kl      sum_x p(x) log(p(x) / q(x))
    lk      -log alpha,      alpha = sum_x min(p(x), q(x)): the probability that a rejection test
    tv      1 - alpha                                       accepts a draft drawn from q

p is known by its likeliest tokens and the mass of all others (`teacher`); that tail is one token
more in every sum, for q too, so `kl` is a lower and `alpha` an upper bound, exact when the teacher
keeps the whole vocabulary. `kl_decay` moves from kl to tv as acceptance grows, the weight of kl
being exp(-kl_decay * alpha) (as SpecForge's LK loss does).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.model import logits_of
from train_mtp.heads.teacher import Teacher
from train_mtp.loss import columns_at_once, join_columns, split_columns

_NO_TAIL = 1e-12  # stands for a tail of nothing, whose logarithm would be infinite
_LEAST_ALPHA = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the terms of one depth's loss.

    Attributes:
        ce, kl, lk, tv: weights, not all 0.
        kl_decay: how fast kl hands over to tv; 0 leaves both as they are.
        temperature: of p and q in kl, lk and tv; positive.
    """

    ce: float = 0.1
    kl: float = 0.9
    lk: float = 0.0
    tv: float = 0.0
    kl_decay: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        weights = {name: getattr(self, name) for name in ("ce", "kl", "lk", "tv")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"objective weights {weights} must not be negative, nor all 0")
        if self.kl_decay < 0:
            raise ValueError(f"{self.kl_decay=} must not be negative")
        if self.kl_decay and not (self.kl and self.tv):
            raise ValueError(f"{self.kl_decay=} hands over from kl to tv: give both a weight")
        if not self.temperature > 0:
            raise ValueError(f"{self.temperature=} must be positive")


class DepthLoss(NamedTuple):
    """One depth of a batch, per anchor.

    Attributes:
        loss: the objective.
        ce, kl: its terms, in nats.
        alpha: [N, B, S], sum min(p, q) at each of the teacher's N temperatures, the objective's
            first.
        best: the head's likeliest token; ties go to the lowest id.
    """

    loss: Float[Array, "B S"]
    ce: Float[Array, "B S"]
    kl: Float[Array, "B S"]
    alpha: Float[Array, "N B S"]
    best: Int[Array, "B S"]


def depth_loss(
    hidden_bsd: Float[Array, "B S D"],
    weight_xd: Float[Array, "X D"],
    labels_bs: Int[Array, "B S"],
    teacher: Teacher,
    objective: Objective,
    *,
    temperatures: tuple[float, ...],
    devices: int = 1,
) -> DepthLoss:
    """The objective of each anchor; differentiable in `hidden_bsd` alone.

    Logits exist for a few columns of the rows at a time and are made again in the backward pass.

    Args:
        hidden_bsd: h^k, after the module's norm.
        weight_xd: weight of the trunk's output head, frozen.
        labels_bs: token i + k + 1 of each anchor.
        teacher: the trunk's law at row i + k (`Teacher.ahead(k)`).
        objective: what counts how much.
        temperatures: those that `teacher.lse` was made with; the objective's own is the first.
        devices: over how many devices the rows are spread.
    """
    assert temperatures[0] == objective.temperature, (temperatures, objective)
    assert len(temperatures) == teacher.lse.shape[0], (temperatures, teacher.lse.shape)
    weight = jax.lax.stop_gradient(weight_xd).astype(hidden_bsd.dtype)
    vocab, length = weight.shape[0], hidden_bsd.shape[1]
    columns = columns_at_once(hidden_bsd.shape[0], vocab, devices)

    @jax.checkpoint
    def chunk(part: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden_bcd, labels_bc, ids, top, *lses = part
        logits = logits_of(hidden_bcd, weight)
        of_top = jnp.take_along_axis(logits, ids, axis=-1)
        at_label = jnp.take_along_axis(logits, labels_bc[..., None], axis=-1)[..., 0]
        ce = jax.nn.logsumexp(logits, axis=-1) - at_label
        kl, alphas = jnp.zeros(()), []
        for n, (t, lse) in enumerate(zip(temperatures, lses, strict=True)):
            p = _law(top / t, lse, vocab)
            q = _law(of_top / t, jax.nn.logsumexp(logits / t, axis=-1), vocab)
            alphas.append(jnp.exp(jnp.minimum(p, q)).sum(axis=-1))
            if n == 0:
                kl = (jnp.exp(p) * (p - q)).sum(axis=-1)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (_weigh(objective, ce, kl, alphas[0]), ce, kl, best, *alphas)

    given = (hidden_bsd, labels_bs, teacher.ids, teacher.logits, *teacher.lse)
    parts = jax.lax.map(chunk, tuple(split_columns(x, columns) for x in given))
    loss, ce, kl, best, *alphas = (join_columns(part, length) for part in parts)
    return DepthLoss(loss, ce, kl, jnp.stack(alphas), best)


def _law(logits_k: jax.Array, lse: jax.Array, vocab: int) -> jax.Array:
    """Log-probabilities [..., K + 1] of K tokens and, last, of all others together if there are."""
    log_probs = jnp.minimum(logits_k - lse[..., None], 0)
    if logits_k.shape[-1] == vocab:
        return log_probs
    rest = 1 - jnp.exp(log_probs).sum(axis=-1, keepdims=True)
    return jnp.concatenate([log_probs, jnp.log(jnp.maximum(rest, _NO_TAIL))], axis=-1)


def _weigh(objective: Objective, ce: Array, kl: Array, alpha: Array) -> Array:
    share = jnp.exp(-objective.kl_decay * jax.lax.stop_gradient(alpha))
    keep = (share, 1 - share) if objective.kl_decay else (1.0, 1.0)
    terms = (
        (objective.ce, ce),
        (objective.kl * keep[0], kl),
        (objective.lk, -jnp.log(jnp.maximum(alpha, _LEAST_ALPHA))),
        (objective.tv * keep[1], 1 - alpha),
    )
    return sum((weight * term for weight, term in terms), jnp.zeros_like(ce))
