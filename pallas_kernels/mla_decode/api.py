"""Contract of `mla_decode`: attention of absorbed queries over the paged latent cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.mla_decode import reference, xla
from pallas_kernels.mla_decode.plan import MlaDecodePlan, plan_mla_decode
from pallas_kernels.select import Implementation, choose, on_gpu_only

__all__ = ["IMPLEMENTATIONS", "MlaDecodePlan", "mla_decode", "plan_mla_decode"]

IMPLEMENTATIONS = (
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
        plan: from `plan_mla_decode`, once a step; made here when absent.
        scale: softmax scale.
        impl: "auto", "reference" or "xla".

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
