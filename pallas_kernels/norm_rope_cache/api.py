"""Contract of `norm_rope_cache`: what a layer of MLA does between its compressing products and the
others.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.norm_rope_cache import xla
from pallas_kernels.select import Implementation, choose, no_ada, too_large, whole_arrays_only

WIDEST = 16384
"""Channels of a row, which a thread block holds in registers."""


def triton_refusal(
    q: jax.Array | None,
    q_weight: jax.Array | None,
    kv: jax.Array,
    kv_weight: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    cache: LatentCache,
    *_: Any,
) -> str | None:
    """Why the kernel in Triton cannot take these arguments (on such a device), or None."""
    dtypes = {str(x.dtype) for x in (q, q_weight, kv, kv_weight) if x is not None}
    if dtypes != {"bfloat16"}:
        return f"needs bfloat16 rows and weights, not {', '.join(sorted(dtypes))}"
    if cache.format != "fp8_tensor" and cache.rope.dtype != jnp.bfloat16:
        return f"needs a cache in bfloat16 or e4m3, not in {cache.rope.dtype}"
    if any(table.dtype != jnp.float32 for table in tables):
        return f"needs float32 tables, not {tables[0].dtype}"
    rows = [x.shape for x in (q, kv) if x is not None]
    if max(shape[1] for shape in rows) > WIDEST:
        return f"needs at most {WIDEST} channels, not {max(shape[1] for shape in rows)}"
    if not kv.size:
        return "needs at least one row"
    # Triton's offsets have 64 bits only in arrays of more than 4 GiB.
    if 2**31 <= cache.latent.size and cache.latent.nbytes <= 2**32:
        return f"needs a pool of less than 2 or more than 4 GiB, not {cache.latent.nbytes} bytes"
    return too_large(*rows)


def _supports_triton(*args: Any) -> str | None:
    return no_ada() or triton_refusal(*args)


def _triton(*args: Any) -> tuple[jax.Array | None, LatentCache]:
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.norm_rope_cache import triton

    return triton.norm_rope_cache(*args)


IMPLEMENTATIONS = (
    Implementation("triton", _triton, auto=whole_arrays_only, supports=_supports_triton),
    # One implementation under two names: it is in fp32 where that matters.
    Implementation("reference", xla.norm_rope_cache),
    Implementation("xla", xla.norm_rope_cache),
)


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
    *,
    eps: float,
    impl: str = "auto",
) -> tuple[jax.Array | None, LatentCache]:
    """Normalises compressed queries and latents, rotates rope keys, and writes latents and keys to
    the cache, in place under donation.

    Source: DeepSeek-V2 report, section 2.1; norms are in fp32, cast, then scaled.

    Args:
        q: compressed queries [T, Q], or None where queries are not compressed.
        q_weight: of their norm; None with them.
        kv: rows [T, C + P]: latent, then rope key in half-split order.
        kv_weight: of the norm of latents.
        tables: cosines and sines of each row's position, float32 [T, P / 2].
        cache: the pool.
        layer: of the pool.
        pages: page of each row; one outside the pool drops the row.
        slots: place in the page.
        eps: of both norms.
        impl: "auto", "reference", "xla" or "triton" (NVIDIA GPUs from compute capability 8.9 on;
            bfloat16; without a gradient; one device or whole copies on each: it is not partitioned
            by itself).

    Returns:
        The normalised queries [T, Q], or None; and the cache.
    """
    args = (q, q_weight, kv, kv_weight, tables, cache, layer, pages, slots, eps)
    run = choose("norm_rope_cache", impl, IMPLEMENTATIONS, *args)
    with jax.named_scope("norm_rope_cache"):
        return run(*args)
