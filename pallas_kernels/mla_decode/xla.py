"""`mla_decode` in plain JAX, in the compute dtype: gathers each sequence's pages once and
multiplies per sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache, gather_rows
from pallas_kernels.mla_decode.plan import MlaDecodePlan
from pallas_kernels.softmax import masked_softmax


def mla_decode(
    q_latent: Float[Array, "T H C"],
    q_rope: Float[Array, "T H P"],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "B W"],
    plan: MlaDecodePlan,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`. Without `plan.queries` every row gathers its own pages."""
    tokens, heads, _ = q_latent.shape
    queries = plan.queries
    if queries is None:
        page_table, queries = page_table[plan.token_seq], 1
    latent_bsc, rope_bsp = gather_rows(cache, layer, page_table)
    groups = tokens // queries
    visible_bq = plan.visible.reshape(groups, queries)
    index_s = jnp.arange(latent_bsc.shape[1])
    seen_bqs = index_s < visible_bq[..., None]
    used_bs1 = (index_s < visible_bq.max(axis=1, keepdims=True))[..., None]
    latent_bsc = jnp.where(used_bs1, latent_bsc, 0).astype(q_latent.dtype)
    rope_bsp = jnp.where(used_bs1, rope_bsp, 0).astype(q_rope.dtype)
    q_latent_bqhc = q_latent.reshape(groups, queries, heads, -1)
    q_rope_bqhp = q_rope.reshape(groups, queries, heads, -1)
    scores_bqhs = jnp.einsum(
        "bqhc,bsc->bqhs", q_latent_bqhc, latent_bsc, preferred_element_type=jnp.float32
    )
    scores_bqhs += jnp.einsum(
        "bqhp,bsp->bqhs", q_rope_bqhp, rope_bsp, preferred_element_type=jnp.float32
    )
    probs_bqhs, lse_bqh = masked_softmax(scores_bqhs * scale, seen_bqs[:, :, None, :])
    probs_bqhs = probs_bqhs.astype(q_latent.dtype)
    out_bqhc = jnp.einsum(
        "bqhs,bsc->bqhc", probs_bqhs, latent_bsc, preferred_element_type=jnp.float32
    )
    return out_bqhc.astype(q_latent.dtype).reshape(q_latent.shape), lse_bqh.reshape(tokens, heads)
