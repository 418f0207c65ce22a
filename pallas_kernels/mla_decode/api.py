"""Contract of `mla_decode`: attention of absorbed queries over the paged latent cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.mla_decode import reference, xla
from pallas_kernels.mla_decode.plan import MlaDecodePlan, plan_mla_decode, with_work
from pallas_kernels.mla_decode.work import TILE
from pallas_kernels.select import (
    Implementation,
    choose,
    count_sms,
    no_hopper,
    on_gpu_only,
    whole_arrays_only,
)

__all__ = [
    "IMPLEMENTATIONS",
    "MlaDecodePlan",
    "mla_decode",
    "plan_mla_decode",
    "schedule_mla_decode",
]


def hopper_refusal(
    q_latent: jax.Array, q_rope: jax.Array, cache: LatentCache, *_: Any
) -> str | None:
    """Why the kernel for Hopper cannot take these arguments (on such a device), or None."""
    heads, latent, rope = q_latent.shape[1], q_latent.shape[2], q_rope.shape[2]
    if heads % TILE and heads not in (8, 16, 32):
        return f"needs 8, 16, 32 or a multiple of {TILE} heads, not {heads}"
    if cache.page_size != TILE:
        return f"needs pages of {TILE} tokens, not {cache.page_size}"
    if latent % 128 or latent > 512 or rope != 64:
        return f"needs up to 512 latent channels, in 128s, and 64 of rope, not {latent} and {rope}"
    rope_type = jnp.float8_e4m3fn if cache.format == "fp8_tensor" else jnp.bfloat16
    if q_latent.dtype != jnp.bfloat16 or cache.rope.dtype != rope_type:
        wanted = f"bfloat16 queries and rope keys of {jnp.dtype(rope_type)}"
        return f"needs {wanted}, not {q_latent.dtype} and {cache.rope.dtype}"
    latent_type = jnp.bfloat16 if cache.format == "auto" else jnp.float8_e4m3fn
    if cache.latent.dtype != latent_type:
        return f"needs a latent of bfloat16, or float8_e4m3fn with scales, not {cache.latent.dtype}"
    return None


def _supports_mosaic_sm90(*args: Any) -> str | None:
    return no_hopper() or hopper_refusal(*args)


def _mosaic_sm90(*args: Any, scale: float) -> tuple[jax.Array, jax.Array]:
    # Not at the top: importing the compiler behind it takes a second or more.
    from pallas_kernels.mla_decode import mosaic_sm90

    return mosaic_sm90.mla_decode(*args, scale=scale)


IMPLEMENTATIONS = (
    Implementation(
        "mosaic_sm90", _mosaic_sm90, auto=whole_arrays_only, supports=_supports_mosaic_sm90
    ),
    Implementation("xla", xla.mla_decode, auto=on_gpu_only),
    Implementation("reference", reference.mla_decode),
)


def mla_decode(
    q_latent: Float[Array, "T H C"],
    q_rope: Float[Array, "T H P"],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "B W"],
    cached_lens: Int[Array, " B"],
    query_starts: Int[Array, " B+1"],
    plan: MlaDecodePlan | None = None,
    *,
    scale: float,
    impl: str = "auto",
) -> tuple[Float[Array, "T H C"], Float[Array, "T H"]]:
    """Attends with queries in latent space: score = scale * (q_latent . latent + q_rope . rope),
    value = latent.

    Query row i of a sequence with n rows and m cached rows (the n new ones already written) sees
    the first m - n + i + 1 of them. Source: DeepSeek-V2 report, section 2.1.3 and appendix C
    (absorbed form).

    Args:
        q_latent: queries through W_UK, [T, H, C].
        q_rope: rotated rope queries, [T, H, P], half-split channels like the cache.
        cache: the whole pool; pages beyond a sequence's length are never used, whatever they hold
            (NaN included).
        layer: layer index in the pool.
        page_table: i32 page ids; entries beyond a sequence's pages may be any number.
        cached_lens: i32, 0 for an idle sequence.
        query_starts: i32, first row of each sequence; rows past query_starts[-1] are padding.
        plan: from `plan_mla_decode` and `schedule_mla_decode`, once a step; made here when absent.
        scale: softmax scale.
        impl: "auto", "reference", "xla" or "mosaic_sm90" (H100 and H200; pages of 64 tokens, bf16
            queries, a bf16 or fp8 cache; one device or whole copies on each: it is not partitioned
            by itself). With an "fp8_tensor" cache it rounds queries to e4m3 with a scale for each
            token and head: for random ones of 576 channels results are off by 3 % of their size,
            by 7.5 % where softmax is peaked (scores of deviation 6).

    Returns:
        out [T, H, C] in the query dtype, and lse [T, H] float32 natural log-sum-exp. A row that
        sees nothing gives out 0 and lse -inf.
    """
    if plan is None:
        plan = plan_mla_decode(cached_lens, query_starts, q_latent.shape[0])
    args = (q_latent, q_rope, cache, layer, page_table, plan)
    run = choose("mla_decode", impl, IMPLEMENTATIONS, *args)
    with jax.named_scope("mla_decode"):
        return run(*args, scale=scale)


def schedule_mla_decode(
    plan: MlaDecodePlan, page_table: Int[Array, "B W"], heads: int
) -> MlaDecodePlan:
    """Adds to a plan what the kernels of this device need to know beforehand; nothing where there
    are none. Saves making it in every layer.

    Args:
        plan: with its final `visible`.
        page_table: as for the op.
        heads: query heads of the op.
    """
    return plan if no_hopper() else with_work(plan, page_table, heads, count_sms())
