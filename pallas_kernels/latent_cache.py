"""The paged latent cache of MLA: one pool of pages for every layer, MTP modules included.

A cached token is its normalised latent (after kv_a_layernorm) and its rotated shared rope key, in
half-split channel order; nothing is stored per head. Pages are addressed by (layer, page, slot); a
sequence's pages are listed in its row of a page table. In a scan over layers the cache is a carry,
never an xs/ys pair: that would make a second pool.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quant import FP8_TILE, QTensor, dequantise, quantise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class LatentCache:
    """Pages of latents and rope keys.

    Attributes:
        latent: [L, pages, page, C]; compute dtype, or float8_e4m3fn when `scale` is there.
        rope: [L, pages, page, P] in the compute dtype (bf16 beside an fp8 latent: rope keys are not
            normalised).
        scale: float32 [L, pages, page, ceil(C / 128)], multipliers of an fp8 latent; None
            otherwise.
    """

    latent: jax.Array
    rope: jax.Array
    scale: jax.Array | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.latent.shape[2]

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.latent.shape[1]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(leaf.nbytes // self.num_pages for leaf in jax.tree.leaves(self))


def write_rows(
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    latent: Float[Array, "T C"],
    rope: Float[Array, "T P"],
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
) -> LatentCache:
    """Writes one row per token in place (under donation). A page id outside the pool drops the row:
    padding uses that.
    """
    where = (
        layer,
        jnp.where(pages < 0, cache.num_pages, pages),
        slots,
    )  # a negative index would wrap around
    new_rope = cache.rope.at[where].set(rope.astype(cache.rope.dtype), mode="drop")
    if cache.scale is None:
        return LatentCache(
            cache.latent.at[where].set(latent.astype(cache.latent.dtype), mode="drop"), new_rope
        )
    q = quantise(latent, FP8_TILE)
    return LatentCache(
        cache.latent.at[where].set(q.values, mode="drop"),
        new_rope,
        cache.scale.at[where].set(q.scales, mode="drop"),
    )


def gather_rows(
    cache: LatentCache, layer: Int[Array, ""] | int, page_table: Int[Array, "B W"]
) -> tuple[Float[Array, "B S C"], Float[Array, "B S P"]]:
    """All rows of each sequence's pages, S = W * page: latents (dequantized to the rope dtype) and
    rope keys.

    Page ids outside the pool are clamped: the caller masks what lies beyond a sequence's length,
    whatever it holds.
    """
    ids = jnp.clip(page_table, 0, cache.num_pages - 1)
    latent = cache.latent[layer, ids]
    rope = cache.rope[layer, ids]
    if cache.scale is not None:
        q = QTensor(latent, cache.scale[layer, ids], (1, 128), "e4m3")
        latent = dequantise(q, rope.dtype)
    b, w, page, _ = latent.shape
    return latent.reshape(b, w * page, -1), rope.reshape(b, w * page, -1)
