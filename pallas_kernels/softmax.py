"""Softmax over a mask, with rows that may be empty, and the merge of partial results."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def masked_softmax(
    scores: Float[Array, "*R S"], mask: Bool[Array, "*#R S"]
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis where `mask` holds, in fp32.

    Returns:
        probabilities (0 outside the mask, all 0 in an empty row) and the natural log-sum-exp (-inf
        in an empty row).
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(safe) + jnp.where(empty, 0, top))
    return weights / safe, lse[..., 0]


def merge(
    out_a: Float[Array, "*R V"],
    lse_a: Float[Array, "*R"],
    out_b: Float[Array, "*R V"],
    lse_b: Float[Array, "*R"],
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over two disjoint sets of keys; exact. An empty side (lse -inf) counts
    nothing, even if it holds NaN.
    """
    lse = jnp.logaddexp(lse_a, lse_b)
    base = jnp.where(jnp.isfinite(lse), lse, 0)
    total = 0.0
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = jnp.exp(part - base)[..., None]
        total += jnp.where(weight > 0, out.astype(jnp.float32) * weight, 0)
    return total.astype(out_a.dtype), lse
