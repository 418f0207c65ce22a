"""The meaning of `mla_decode`, in fp32."""

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
    """See `api.mla_decode`."""
    latent_bsc, rope_bsp = gather_rows(cache, layer, page_table)
    seen_ts = jnp.arange(latent_bsc.shape[1]) < plan.visible[:, None]
    # where, not a product: unused pages may hold NaN, and 0 * NaN is NaN.
    latent_tsc = jnp.where(seen_ts[..., None], latent_bsc[plan.token_seq].astype(jnp.float32), 0)
    rope_tsp = jnp.where(seen_ts[..., None], rope_bsp[plan.token_seq].astype(jnp.float32), 0)
    scores_ths = jnp.einsum(
        "thc,tsc->ths", q_latent.astype(jnp.float32), latent_tsc, precision="highest"
    )
    scores_ths += jnp.einsum(
        "thp,tsp->ths", q_rope.astype(jnp.float32), rope_tsp, precision="highest"
    )
    probs_ths, lse_th = masked_softmax(scores_ths * scale, seen_ts[:, None, :])
    out_thc = jnp.einsum("ths,tsc->thc", probs_ths, latent_tsc, precision="highest")
    return out_thc.astype(q_latent.dtype), lse_th
