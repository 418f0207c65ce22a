"""Losses and figures of draft heads over a batch.

Depth k at anchor i reads tokens up to i + k and predicts token i + k + 1; the trunk's word on that
token is row i + k of its law. An anchor is valid at depth k if tokens i..i+k+1 lie in one segment
and the last of them is one that counts, and each depth is divided by its own number of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.config import ModelConfig
from dskjax.model import MtpOutput, mtp_chain
from dskjax.params import Params, cast
from dskjax.recycled import mtp_recycled
from train_mtp.heads.objective import DepthLoss, depth_loss
from train_mtp.heads.recipe import HeadsRecipe
from train_mtp.heads.teacher import Teacher
from train_mtp.loss import Labels, count_loads, labels_at


class Taught(NamedTuple):
    """What the trunk gives to heads: h^0 in the compute dtype [B, S, D], and its law."""

    hidden: jax.Array
    teacher: Teacher


class HeadSums(NamedTuple):
    """Sums over a batch; row k - 1 belongs to depth k.

    Attributes:
        loss, ce, kl: of the valid anchors.
        tokens: valid anchors.
        top1: those whose likeliest token is the text's.
        agree: those whose likeliest token is the trunk's: what greedy verification accepts.
        agree_chain: those where that holds at this depth and all before.
        alpha: [N, K], sum min(p, q) at each temperature.
        alpha_chain: [N, K], products of alpha over this depth and all before.
        loads: rows each expert was chosen for [modules, E].
    """

    loss: Float[Array, " K"]
    ce: Float[Array, " K"]
    kl: Float[Array, " K"]
    tokens: Int[Array, " K"]
    top1: Int[Array, " K"]
    agree: Int[Array, " K"]
    agree_chain: Int[Array, " K"]
    alpha: Float[Array, "N K"]
    alpha_chain: Float[Array, "N K"]
    loads: Int[Array, "L E"]


def trunk_head(params: Params, cfg: ModelConfig) -> jax.Array:
    """Weight [X, D] of the output head."""
    return params["embed_tokens" if cfg.tie_word_embeddings else "lm_head"]["weight"]


def unroll(
    heads: Params, frozen: Params, batch: Any, hidden: jax.Array, *, recipe: HeadsRecipe
) -> MtpOutput:
    """h^1..h^K of every anchor, by the rule that serving will use.

    Args:
        heads: `mtp_layers` in the compute dtype.
        frozen: the trunk; its embedding is used.
        batch: packed rows.
        hidden: h^0.
        recipe: how.
    """
    run = mtp_chain if recipe.weights == "independent" else mtp_recycled
    embedding = jax.lax.stop_gradient(frozen["embed_tokens"]["weight"])
    params = {**heads, "embed_tokens": {"weight": embedding.astype(hidden.dtype)}}
    return run(
        params,
        batch.tokens,
        hidden,
        cfg=recipe.cfg,
        depths=recipe.depths,
        segment_ids=batch.segment_ids,
        positions=batch.positions,
        impl=recipe.impl,
        remat=recipe.policy,
        detach=recipe.detach,
        sharding=recipe.sharding,
    )


def head_sums(
    heads: Params, frozen: Params, batch: Any, taught: Taught, *, recipe: HeadsRecipe
) -> HeadSums:
    """Losses and figures of a batch; differentiable in `heads` (fp32 masters)."""
    compute = cast(heads, recipe.specs(), jnp.dtype(recipe.precision))
    weight = trunk_head(frozen, recipe.cfg)
    out = unroll(compute, frozen, batch, taught.hidden, recipe=recipe)
    losses, labels = [], []
    for k, h in enumerate(out.hidden, start=1):
        at = labels_at(k, batch.tokens, batch.segment_ids, batch.scored)
        losses.append(
            depth_loss(
                h,
                weight,
                at.ids,
                taught.teacher.ahead(k),
                recipe.objective,
                temperatures=recipe.temperatures,
                devices=recipe.devices,
            )
        )
        labels.append(at)
    return _sum_up(losses, labels, taught.teacher, out, recipe)


def _sum_up(
    losses: list[DepthLoss],
    labels: list[Labels],
    teacher: Teacher,
    out: MtpOutput,
    recipe: HeadsRecipe,
) -> HeadSums:
    rows: list[dict[str, jax.Array]] = []
    agreed, chained = jnp.ones((), bool), jnp.ones(())
    for k, (loss, at) in enumerate(zip(losses, labels, strict=True), start=1):
        agree = loss.best == teacher.ahead(k).ids[..., 0]
        agreed, chained = agreed & agree, chained * jnp.minimum(loss.alpha, 1)
        values = {
            **{"loss": loss.loss, "ce": loss.ce, "kl": loss.kl, "tokens": at.valid},
            **{"top1": loss.best == at.ids, "agree": agree, "agree_chain": agreed},
            **{"alpha": loss.alpha, "alpha_chain": chained},
        }
        rows.append({n: jnp.where(at.valid, x, 0).sum((-2, -1)) for n, x in values.items()})
    sums = {name: jnp.stack([row[name] for row in rows], axis=-1) for name in rows[0]}
    valid = jnp.stack([at.valid for at in labels])
    loads = count_loads(jnp.stack(out.experts), valid, recipe.cfg)
    if recipe.weights == "shared":
        loads = loads.sum(axis=0, keepdims=True)
    return HeadSums(**sums, loads=loads)


def objective_of(sums: HeadSums, recipe: HeadsRecipe, tokens: jax.Array | None = None) -> jax.Array:
    """The scalar to minimise: each depth's mean over its own valid anchors, weighed.

    Args:
        sums: of a batch or of a part of one.
        recipe: the depths' weights.
        tokens: valid anchors by depth of the whole batch, if `sums` is of a part.
    """
    count = jnp.maximum(sums.tokens if tokens is None else tokens, 1)
    return (jnp.asarray(recipe.depth_weights) * sums.loss / count).sum()


def head_metrics(sums: HeadSums, recipe: HeadsRecipe) -> dict[str, Any]:
    """Means over the valid anchors, by depth, and what they promise of speculation.

    `accepted_length` is 1 + sum_k P(depths 1..k are all accepted): the tokens a step of K drafts
    emits, were every anchor as likely to start one and the text itself drafted. One for greedy
    decoding, and one for each temperature with a rejection test.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    metrics = {
        "loss": objective_of(sums, recipe),
        "mtp_loss": sums.loss / tokens,
        **{f"mtp_{name}": getattr(sums, name) / tokens for name in ("ce", "kl", "top1", "agree")},
        "tokens": sums.tokens,
        "agree_given": _given(sums.agree_chain / tokens),
        "accepted_length": 1 + (sums.agree_chain / tokens).sum(),
    }
    for n, t in enumerate(recipe.temperatures):
        chain = sums.alpha_chain[n] / tokens
        metrics[f"alpha_t{t:g}"] = sums.alpha[n] / tokens
        metrics[f"alpha_given_t{t:g}"] = _given(chain)
        metrics[f"accepted_length_t{t:g}"] = 1 + chain.sum()
    return metrics


def _given(chain_k: jax.Array) -> jax.Array:
    """P(depth k is accepted | all before are) from the chances of getting so far."""
    before = jnp.concatenate([jnp.ones(1), chain_k[:-1]])
    return chain_k / jnp.maximum(before, 1e-9)
