"""`norm_rope_cache` in plain JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache, write_rows
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope import rotate


def norm_rope_cache(
    q: Float[Array, "T Q"] | None,
    q_weight: Float[Array, " Q"] | None,
    kv: Float[Array, "T K"],
    kv_weight: Float[Array, " C"],
    tables: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    eps: float,
) -> tuple[jax.Array | None, LatentCache]:
    """See `api.norm_rope_cache`."""
    normed = None if q is None or q_weight is None else rms_norm(q, q_weight, eps)
    latent, rope = norm_rope(kv, kv_weight, tables, eps)
    with jax.named_scope("cache_write"):
        return normed, write_rows(cache, layer, latent, rope, pages, slots)


def norm_rope(
    kv: Float[Array, "T K"],
    weight: Float[Array, " C"],
    tables: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    eps: float,
) -> tuple[Float[Array, "T C"], Float[Array, "T P"]]:
    """(Normalised latents, rotated rope keys) of rows that hold both; rope keys are not normed."""
    latent, rope = jnp.split(kv, [weight.shape[0]], axis=-1)
    return rms_norm(latent, weight, eps), rotate(rope, tables)
