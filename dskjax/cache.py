"""Allocation of the latent cache for a model: trunk layers first, then one layer per MTP module."""

from typing import Any

import jax.numpy as jnp

from dskjax.config import ModelConfig
from pallas_kernels import LatentCache


def init_cache(
    cfg: ModelConfig, *, num_pages: int, page_size: int, dtype: Any, kv_dtype: str = "auto"
) -> LatentCache:
    """A zeroed pool of pages for every layer of the model.

    Args:
        cfg: the model.
        num_pages: pages shared by all sequences.
        page_size: tokens a page; GPU kernels need 64, the reference takes any.
        dtype: compute dtype; rope keys (and latents, unless fp8) are stored in it.
        kv_dtype: "auto" stores latents in `dtype`; "fp8" as e4m3 with a scale per token and 128
            channels; "fp8_tensor" latents and rope keys as e4m3 with the scale 1.0, so nothing
            beyond 448.

    Raises:
        ValueError: a size below 1, or an unknown kv_dtype.
    """
    if num_pages < 1 or page_size < 1:
        raise ValueError(f"{num_pages=} and {page_size=} must be at least 1")
    if kv_dtype not in ("auto", "fp8", "fp8_tensor"):
        raise ValueError(f"{kv_dtype=} must be 'auto', 'fp8' or 'fp8_tensor'")
    lead = (cfg.num_cache_layers, num_pages, page_size)
    latent = cfg.mla.kv_lora_rank
    rope = jnp.zeros((*lead, cfg.mla.qk_rope_head_dim), dtype)
    if kv_dtype == "fp8_tensor":
        e4m3 = jnp.float8_e4m3fn
        return LatentCache(
            jnp.zeros((*lead, latent), e4m3), rope.astype(e4m3), jnp.ones(lead[0], jnp.float32)
        )
    if kv_dtype == "fp8":
        scale = jnp.ones((*lead, -(-latent // 128)), jnp.float32)
        return LatentCache(jnp.zeros((*lead, latent), jnp.float8_e4m3fn), rope, scale)
    return LatentCache(jnp.zeros((*lead, latent), dtype), rope)
