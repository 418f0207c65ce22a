"""The paged latent cache of MLA: one pool of pages for every layer, MTP modules included.

A cached token is its normalised latent (after kv_a_layernorm) and its rotated shared rope key, in
half-split channel order; nothing is stored per head. Pages are addressed by (layer, page, slot); a
sequence's pages are listed in its row of a page table. In a scan over layers the cache is a carry,
never an xs/ys pair: that would make a second pool.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quant import E4M3_MAX, FP8_TILE, QTensor, dequantise, quantise

Format = Literal["auto", "fp8", "fp8_tensor"]
"""How rows are stored: "auto" in the compute dtype; "fp8", latents as e4m3 with a scale per token
and 128 channels; "fp8_tensor", latents and rope keys as e4m3 with one scale for a layer.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class LatentCache:
    """Pages of latents and rope keys.

    Attributes:
        latent: [L, pages, page, C]; compute dtype, or float8_e4m3fn when `scale` is there.
        rope: [L, pages, page, P] in the compute dtype (bf16 beside an "fp8" latent: rope keys are
            not normalised), or float8_e4m3fn in "fp8_tensor".
        scale: multipliers of e4m3 values, float32 [L, pages, page, ceil(C / 128)] of an "fp8"
            latent, or [L] in "fp8_tensor": the caller's, one for latents and rope keys alike,
            because scores add up products of both. 1.0 is usual, like the k_scale of vLLM and
            FlashMLA; what is larger than 448 scales is stored as 448 scales. None otherwise.
    """

    latent: jax.Array
    rope: jax.Array
    scale: jax.Array | None = None

    @property
    def format(self) -> Format:
        """How rows are stored."""
        if self.scale is None:
            return "auto"
        return "fp8" if self.scale.ndim == 4 else "fp8_tensor"

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
        paged = (leaf for leaf in jax.tree.leaves(self) if leaf.ndim == 4)
        return sum(leaf.nbytes // self.num_pages for leaf in paged)


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
    if cache.format == "fp8_tensor":
        assert cache.scale is not None
        scale = cache.scale[layer]
        return LatentCache(
            cache.latent.at[where].set(_to_e4m3(latent, scale), mode="drop"),
            cache.rope.at[where].set(_to_e4m3(rope, scale), mode="drop"),
            cache.scale,
        )
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


def _to_e4m3(x: jax.Array, scale: jax.Array) -> jax.Array:
    scaled = x.astype(jnp.float32) / scale
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def gather_rows(
    cache: LatentCache, layer: Int[Array, ""] | int, page_table: Int[Array, "B W"]
) -> tuple[Float[Array, "B S C"], Float[Array, "B S P"]]:
    """All rows of each sequence's pages, S = W * page: latents and rope keys, "fp8" latents in the
    rope dtype, both of "fp8_tensor" in fp32.

    Page ids outside the pool are clamped: the caller masks what lies beyond a sequence's length,
    whatever it holds.
    """
    ids = jnp.clip(page_table, 0, cache.num_pages - 1)
    latent = cache.latent[layer, ids]
    rope = cache.rope[layer, ids]
    if cache.format == "fp8_tensor":
        assert cache.scale is not None
        latent, rope = (x.astype(jnp.float32) * cache.scale[layer] for x in (latent, rope))
    elif cache.scale is not None:
        q = QTensor(latent, cache.scale[layer, ids], (1, 128), "e4m3")
        latent = dequantise(q, rope.dtype)
    b, w, page, _ = latent.shape
    return latent.reshape(b, w * page, -1), rope.reshape(b, w * page, -1)
