"""Acceptance rules that change the law of the text: more drafts stay, at a price.

The lossless rules and their conventions are in `dskjax.decode.acceptance`; shapes and the meaning
of p, drafts, q, u_accept and u_final are those of its opening. Every parameter is an array with one
value a row. A draft that is no token (-1) is never accepted.

    typical   accept d if p(d) > min(eps, delta exp(-H(p))): Medusa (arXiv 2401.10774, section 3.3).
              Acceptance is deterministic and both accepted and added tokens come from the cut p, so
              the text is less varied than p; a one-hot p makes it the strict rule.
    relaxed   accept d if it is among the likeliest few: TensorRT-LLM's relaxed acceptance for the
              thinking phase. The target is greedy.
    lenient   accept d with min(1, p(d) / (l q(d))): lenience of Leviathan et al. 2023 (arXiv
              2211.17192, appendix A.5), kept with the ordinary residual. The law of a token is at
              most sum_x min(q, p/l) - min(q, p) <= 1 - l away from p in total variation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dskjax.decode.acceptance import Accepted, rejection_accept_probs, rejection_residual
from dskjax.decode.sampling import sample


def typical(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    u_final: Float[Array, "B n"],
    *,
    eps: Float[Array, " B"],
    delta: Float[Array, " B"],
) -> Accepted:
    """Keeps drafts while they are typical of p, then adds a token of p restricted to typical ones.

    Args:
        p: target laws; with one slot more than there are drafts.
        drafts: i32.
        u_final: draws the added token.
        eps: largest probability that a token may need, in [0, 1].
        delta: scale of exp(-entropy), in [0, 1]; above 1 a law may have no typical token but its
            likeliest, which always counts as one.
    """
    mask = typical_mask(p, eps=eps, delta=delta)
    m = drafts.shape[1]
    kept = jnp.take_along_axis(mask[:, :m], _index(drafts, p), axis=2)[..., 0]
    accepted = _leading(kept & _is_token(drafts, p))
    law = _at_slot(jnp.where(mask, p, 0), accepted)
    return _emit(drafts, accepted, sample(law, _at_slot(u_final, accepted)))


def typical_mask(
    p: Float[Array, "B n X"], *, eps: Float[Array, " B"], delta: Float[Array, " B"]
) -> Bool[Array, "B n X"]:
    """Tokens with p(x) > min(eps, delta exp(-H(p))), and the likeliest one."""
    plogp = jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)
    cut = jnp.minimum(eps[:, None], delta[:, None] * jnp.exp(jnp.sum(plogp, axis=-1)))
    return (p > cut[..., None]) | (p >= jnp.max(p, axis=-1, keepdims=True))


def relaxed(
    raw_logits: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    thinking: Bool[Array, "B n"],
    *,
    top_n: Int[Array, " B"],
    delta: Float[Array, " B"],
) -> Accepted:
    """Keeps drafts while they are candidates, then adds the argmax of the slot they stop at.

    Candidates of a thinking slot are the top_n likeliest tokens (ties: lowest id first) with a
    probability of at least p_max - delta, where probabilities are softmax(raw_logits) at
    temperature 1 (a difference of probabilities, not of their logarithms). Elsewhere the argmax is
    the only one, as it is with top_n = 1 or delta = 0 without ties. The request's temperature plays
    no part.

    Args:
        raw_logits: target logits before temperature.
        drafts: i32.
        thinking: phase of each slot, see `dskjax.decode.phase.thinking_slots`.
        top_n: most candidates, at least 1.
        delta: in [0, 1].
    """
    m = drafts.shape[1]
    logits = raw_logits[:, :m]
    index = _index(drafts, raw_logits)
    drafted = jnp.take_along_axis(logits, index, axis=2)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    ahead = (logits > drafted) | ((logits == drafted) & (ids < index))
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)
    best = jnp.max(logits, axis=2, keepdims=True)
    total = jnp.sum(jnp.exp(logits - best), axis=2)  # the likeliest token has probability 1/total
    near = jnp.exp(drafted - best)[..., 0] / total >= 1 / total - delta[:, None]
    is_candidate = jnp.where(thinking[:, :m], (rank < top_n[:, None]) & near, rank == 0)
    accepted = _leading(is_candidate & _is_token(drafts, raw_logits))
    choice = jnp.argmax(raw_logits, axis=-1).astype(jnp.int32)
    return _emit(drafts, accepted, _at_slot(choice, accepted))


def lenient(
    p: Float[Array, "B n X"],
    drafts: Int[Array, "B m"],
    q: Float[Array, "B m X"],
    u_accept: Float[Array, "B m"],
    u_final: Float[Array, "B n"],
    thinking: Bool[Array, "B n"],
    *,
    lenience: Float[Array, " B"],
) -> Accepted:
    """Rejection that accepts d with min(1, p(d) / (l q(d))) in thinking slots, l = 1 elsewhere.

    A rejected draft gives way to norm(max(p - q, 0)), as in `acceptance.rejection`: slots outside
    the thinking are exactly that rule, hence lossless.

    Args:
        p: target laws.
        drafts: i32.
        q: laws of the drafts; a zero row is no draft.
        u_accept: tests the drafts.
        u_final: draws the added token.
        thinking: phase of each slot.
        lenience: l in (0, 1]; 1 is the lossless rule.
    """
    scale = jnp.where(thinking, lenience[:, None].astype(p.dtype), 1)
    accepted = _leading(u_accept < rejection_accept_probs(p / scale[..., None], drafts, q))
    law = rejection_residual(p, drafts, q, accepted)
    return _emit(drafts, accepted, sample(law, _at_slot(u_final, accepted)))


def _index(drafts: Array, laws: Array) -> Array:
    return jnp.clip(drafts, 0, laws.shape[-1] - 1)[..., None]


def _is_token(drafts: Array, laws: Array) -> Array:
    return (drafts >= 0) & (drafts < laws.shape[-1])


def _leading(flags: Array) -> Array:
    """How many flags of each row are set before the first that is not; i32 [B]."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _at_slot(x: Array, slot: Array) -> Array:
    """x[b, slot[b]] of every row."""
    return x[jnp.arange(x.shape[0]), slot]


def _emit(drafts: Array, accepted: Array, last: Array) -> Accepted:
    """The accepted drafts, then `last`, then zeros."""
    slots = jnp.arange(drafts.shape[1] + 1)
    padded = jnp.pad(drafts.astype(jnp.int32), ((0, 0), (0, 1)))
    tokens = jnp.where(slots == accepted[:, None], last[:, None], padded)
    return Accepted(tokens=jnp.where(slots <= accepted[:, None], tokens, 0), count=accepted + 1)
