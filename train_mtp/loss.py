"""Losses of the trunk and of its chain of MTP modules over packed rows (DeepSeek-V3 report, 2.2).

    L = L_0 + lambda / K * sum_k L_k        L_k = mean over valid anchors i of -log p_k(t[i+k+1])

Depth 0 is the trunk, depth k = 1..K the k-th MTP module. Anchor i is valid at depth k if tokens
i..i+k+1 lie in one segment, so padding and document borders are masked at the label, and each depth
is divided by its own count. Logits exist for a few columns of the rows at a time.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.model import Remat, logits_of, mtp_chain, param_specs, trunk
from dskjax.params import Params, cast

CHUNK_BYTES = 1 << 30
"""fp32 logits that may exist at one time, per device. Each chunk reads and writes the gradient of
the head's weight, so smaller ones cost time.
"""


class Labels(NamedTuple):
    """What each anchor should predict at one depth.

    Attributes:
        ids: token i + depth + 1; anything where `valid` is False.
        valid: whether the loss of the anchor counts.
    """

    ids: Int[Array, "B S"]
    valid: Bool[Array, "B S"]


def labels_at(
    depth: int,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    scored: Int[Array, "B S"] | None = None,
) -> Labels:
    """Labels of one depth: 0 for the trunk, k for the k-th MTP module.

    Args:
        depth: how many tokens lie between an anchor and its label.
        tokens: ids.
        segment_ids: document of each token; 0 is padding.
        scored: 0 for tokens that do not count when they are labels; None if all count.
    """
    with_next = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] > 0)
    valid = joined = jnp.pad(with_next, ((0, 0), (0, 1)))
    for ahead in range(1, depth + 1):
        valid &= shift_left(joined, ahead)
    if scored is not None:
        valid &= shift_left(scored, depth + 1) > 0
    return Labels(shift_left(tokens, depth + 1), valid)


def shift_left(x_bs: Array, by: int) -> Array:
    """Column i takes the value of column i + by; zeros (False) come in at the end."""
    by = min(by, x_bs.shape[1])
    return jnp.pad(x_bs[:, by:], ((0, 0), (0, by), *((0, 0),) * (x_bs.ndim - 2)))


class TokenLoss(NamedTuple):
    """Results of `head_loss`, per token.

    Attributes:
        nats: -log softmax(logits)[label].
        lse: log-sum-exp of the logits.
        best: the likeliest token; ties go to the lowest id.
    """

    nats: Float[Array, "B S"]
    lse: Float[Array, "B S"]
    best: Int[Array, "B S"]


def columns_at_once(batch: int, vocab: int, devices: int = 1) -> int:
    """How many columns of the rows may have their logits at one time (`CHUNK_BYTES`)."""
    return max(1, CHUNK_BYTES * devices // (4 * batch * vocab))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss(
    hidden_bsd: Float[Array, "B S D"],
    weight_xd: Float[Array, "X D"],
    labels_bs: Int[Array, "B S"],
    columns: int,
) -> TokenLoss:
    """Output head and cross entropy in one, `columns` columns of the rows at a time.

    The product runs in the dtype of `hidden_bsd` with fp32 logits. The backward pass makes the
    logits again, chunk by chunk; the gradient of the weight is summed over chunks in fp32 and
    returned in the weight's dtype, so hand in the fp32 master.

    Args:
        hidden_bsd: hidden states after a final norm.
        weight_xd: weight of the head.
        labels_bs: the token each row should predict; its nats are read off at it.
        columns: size of a chunk along S.
    """
    return _head_loss_forward(hidden_bsd, weight_xd, labels_bs, columns)[0]


def _is_label(labels_bc: Array, vocab: int) -> Array:
    # A comparison, not a gather: it fuses with what follows and splits over the vocabulary.
    return labels_bc[..., None] == jnp.arange(vocab)


# Logits are the largest arrays of a step: each of these reads them once for two results.
def _largest(logits: Array) -> tuple[Array, Array]:
    """Maximum over the vocabulary and where it is; of equal ones the lowest id."""

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        is_a = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(is_a, a[0], b[0]), jnp.where(is_a, a[1], b[1])

    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    nothing = jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max)
    return jax.lax.reduce((logits, ids), nothing, larger, (logits.ndim - 1,))


def _sums(a: Array, b: Array) -> tuple[Array, Array]:
    def add(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
        return x[0] + y[0], x[1] + y[1]

    return jax.lax.reduce((a, b), (jnp.float32(0), jnp.float32(0)), add, (a.ndim - 1,))


def _head_loss_forward(
    hidden_bsd: Array, weight_xd: Array, labels_bs: Array, columns: int
) -> tuple[TokenLoss, tuple[Array, ...]]:
    weight = weight_xd.astype(hidden_bsd.dtype)

    def chunk(part: tuple[Array, Array]) -> TokenLoss:
        hidden_bcd, labels_bc = part
        logits = logits_of(hidden_bcd, weight)
        largest, best = _largest(logits)
        at_label = jnp.where(_is_label(labels_bc, logits.shape[-1]), logits, 0)
        total, at_label = _sums(jnp.exp(logits - largest[..., None]), at_label)
        lse = largest + jnp.log(total)
        return TokenLoss(lse - at_label, lse, best)

    parts = jax.lax.map(
        chunk, (split_columns(hidden_bsd, columns), split_columns(labels_bs, columns))
    )
    out = TokenLoss(*(join_columns(part, hidden_bsd.shape[1]) for part in parts))
    return out, (hidden_bsd, weight_xd, labels_bs, out.lse)


def _head_loss_backward(columns: int, saved: tuple[Array, ...], grads: Any) -> tuple[Any, ...]:
    hidden_bsd, weight_xd, labels_bs, lse_bs = saved
    dtype = hidden_bsd.dtype
    weight = weight_xd.astype(dtype)

    def chunk(d_weight: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden_bcd, labels_bc, lse_bc, d_nats_bc, d_lse_bc = part
        probs = jnp.exp(logits_of(hidden_bcd, weight) - lse_bc[..., None])
        d_logits = probs * (d_nats_bc + d_lse_bc)[..., None]
        d_logits -= jnp.where(_is_label(labels_bc, probs.shape[-1]), d_nats_bc[..., None], 0)
        d_logits = d_logits.astype(dtype)
        d_hidden = jnp.einsum(
            "bcx,xd->bcd", d_logits, weight, preferred_element_type=jnp.float32
        ).astype(dtype)
        d_weight += jnp.einsum(
            "bcx,bcd->xd", d_logits, hidden_bcd, preferred_element_type=jnp.float32
        )
        return d_weight, d_hidden

    parts = tuple(
        split_columns(x, columns) for x in (hidden_bsd, labels_bs, lse_bs, grads[0], grads[1])
    )
    d_weight, d_hidden = jax.lax.scan(chunk, jnp.zeros(weight_xd.shape, jnp.float32), parts)
    return join_columns(d_hidden, hidden_bsd.shape[1]), d_weight.astype(weight_xd.dtype), None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def split_columns(x: Array, columns: int) -> Array:
    """[B, S, ...] -> [chunks, B, columns', ...]; rows stay whole, so that they may be sharded."""
    b, s = x.shape[:2]
    chunks = -(-s // columns)
    size = -(-s // chunks)
    padded = jnp.pad(x, ((0, 0), (0, chunks * size - s), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(padded.reshape(b, chunks, size, *x.shape[2:]), 1, 0)


def join_columns(x: Array, s: int) -> Array:
    """Undoes `split_columns`; `s` is the length of S."""
    chunks, b, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(b, chunks * size, *x.shape[3:])[:, :s]


class LossSums(NamedTuple):
    """Sums over a batch, from which means and metrics are made; row 0 is the trunk, row k depth k.

    Attributes:
        nats: cross entropy, in nats.
        lse_squares: squared log-sum-exps, for the z-loss.
        tokens: valid anchors.
        top1: valid anchors whose likeliest token is the label.
        agree: valid anchors of depth k whose likeliest token is the trunk's at row i + k; what a
            greedy verification accepts at the first draft (row 0: all of them).
        loads: for each stack of layers with experts, the rows each expert was chosen for [L, E],
            without padding and invalid anchors.
    """

    nats: Float[Array, " depths"]
    lse_squares: Float[Array, " depths"]
    tokens: Int[Array, " depths"]
    top1: Int[Array, " depths"]
    agree: Int[Array, " depths"]
    loads: dict[str, Int[Array, "L E"]]

    @property
    def means(self) -> Float[Array, " depths"]:
        """Mean cross entropy of each depth; 0 where nothing is valid."""
        return self.nats / jnp.maximum(self.tokens, 1)


def loss_sums(
    params: Params,
    batch: Any,
    *,
    cfg: ModelConfig,
    dtype: Any,
    impl: str = "auto",
    remat: Remat = None,
    sharding: Sharding | None = None,
) -> LossSums:
    """Runs the trunk and every MTP module over packed rows. Differentiable in `params`.

    Args:
        params: master weights, fp32.
        batch: a `train_mtp.data.Batch`.
        cfg: the model.
        dtype: compute dtype; weights that fix theirs keep it.
        impl: implementation of every op.
        remat: checkpoint policy of each layer.
        sharding: mesh and rules, None on one device.
    """
    tokens, segment_ids = batch.tokens, batch.segment_ids
    compute = cast(params, param_specs(cfg), dtype)
    weight = params["embed_tokens" if cfg.tie_word_embeddings else "lm_head"]["weight"]
    if sharding is not None:  # whole along the embed axis, once: the chunks would gather it again
        weight = sharding.constrain(weight, ("vocab", None))
    where: dict[str, Any] = {"segment_ids": segment_ids, "positions": batch.positions}
    options: dict[str, Any] = {"cfg": cfg, "impl": impl, "remat": remat, "sharding": sharding}
    columns = columns_at_once(
        tokens.shape[0], cfg.vocab_size, 1 if sharding is None else sharding.mesh.size
    )
    depths = cfg.mtp.num_nextn_predict_layers

    out = trunk(compute, tokens, **options, **where)
    hidden, loads = [out.hidden], {}
    if out.experts is not None:
        loads["moe_layers"] = count_loads(out.experts, (segment_ids > 0)[None], cfg)
    labels = [labels_at(k, tokens, segment_ids, batch.scored) for k in range(depths + 1)]
    if depths:
        mtp = mtp_chain(compute, tokens, out.hidden, depths=depths, **options, **where)
        hidden += mtp.hidden
        valid = jnp.stack([at.valid for at in labels[1:]])
        loads["mtp_layers"] = count_loads(jnp.stack(mtp.experts), valid, cfg)

    losses: list[TokenLoss] = []
    for h, at in zip(hidden, labels, strict=True):
        with jax.named_scope("loss"):
            losses.append(head_loss(h, weight, at.ids, columns))
    best = losses[0].best

    def over_valid(values: Iterable[Array]) -> Array:
        pairs = zip(labels, values, strict=True)
        return jnp.stack([jnp.where(at.valid, value, 0).sum() for at, value in pairs])

    return LossSums(
        nats=over_valid(loss.nats for loss in losses),
        lse_squares=over_valid(jnp.square(loss.lse) for loss in losses),
        tokens=jnp.stack([at.valid.sum() for at in labels]),
        top1=over_valid(x.best == at.ids for x, at in zip(losses, labels, strict=True)),
        agree=over_valid(x.best == shift_left(best, k) for k, x in enumerate(losses)),
        loads=loads,
    )


def count_loads(
    experts: Int[Array, "L B S K"], valid: Bool[Array, "#L B S"], cfg: ModelConfig
) -> Int[Array, "L E"]:
    """How many valid rows each expert of each layer was chosen for."""
    assert cfg.moe is not None
    chosen = experts[..., None] == jnp.arange(cfg.moe.n_routed_experts)
    return (chosen & valid[..., None, None]).sum(axis=(1, 2, 3), dtype=jnp.int32)


def total_loss(sums: LossSums, *, mtp_weight: float, z_loss: float = 0.0) -> Float[Array, ""]:
    """L_0 + mtp_weight / K * sum_k L_k, each L with `z_loss` times its mean squared lse added."""
    per_depth = sums.means
    if z_loss:
        per_depth += z_loss * sums.lse_squares / jnp.maximum(sums.tokens, 1)
    depths = per_depth.shape[0] - 1
    return per_depth[0] + (mtp_weight / depths * per_depth[1:].sum() if depths else 0.0)
