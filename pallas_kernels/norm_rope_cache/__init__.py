"""Norms of MLA's compressed queries and keys, rotation of the rope key, and the write to the latent
cache.
"""

from pallas_kernels.norm_rope_cache.api import norm_rope_cache

__all__ = ["norm_rope_cache"]
