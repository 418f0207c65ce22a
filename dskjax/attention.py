"""How a layer attends: over whole sequences, or over the paged cache in expanded or absorbed
form.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dskjax.batch import BatchPlan, RaggedBatch
from dskjax.config import ModelConfig
from dskjax.layers.block import Attend
from dskjax.layers.mla import Mla, Queries, Rows, Tables
from pallas_kernels import LatentCache, MlaPrefillPlan, mla_decode, mla_prefill
from pallas_kernels.latent_cache import gather_rows


def over_sequences(tables: Tables, plan: MlaPrefillPlan, cfg: ModelConfig, impl: str) -> Attend:
    """Attention among the rows at hand, without a cache: training and scoring."""

    def attend(mla: Mla, x_td: jax.Array) -> tuple[jax.Array, None]:
        p = mla.project(x_td, tables, impl=impl)
        k_nope, v = mla.expand(p.latent, impl=impl)
        out, _ = mla_prefill(
            p.q_nope,
            p.q_rope,
            k_nope,
            p.k_rope,
            v,
            plan,
            scale=cfg.softmax_scale,
            with_lse=False,
            impl=impl,
        )
        return mla.output(out, impl=impl), None

    return attend


def over_cache(
    tables: Tables,
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    parts: tuple[RaggedBatch, ...],
    plans: tuple[BatchPlan, ...],
    cfg: ModelConfig,
    impl: str,
) -> Attend:
    """Attention over the paged cache: writes the new rows, then each part attends in its own
    form.
    """

    def attend(mla: Mla, x_td: jax.Array) -> tuple[jax.Array, LatentCache]:
        pages, slots = (
            jnp.concatenate([getattr(plan, name) for plan in plans]) for name in ("pages", "slots")
        )
        p, written = mla.project_into(cache, Rows(layer, pages, slots), x_td, tables, impl=impl)
        outs, start = [], 0
        for part, plan in zip(parts, plans, strict=True):
            rows = slice(start, start + part.num_tokens)
            run = _absorbed if part.form == "absorbed" else _expanded
            outs.append(run(mla, p, rows, written, layer, part, plan, cfg, impl))
            start = rows.stop
        return mla.output(jnp.concatenate(outs) if len(outs) > 1 else outs[0], impl=impl), written

    return attend


def _absorbed(
    mla: Mla,
    p: Queries,
    rows: slice,
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    part: RaggedBatch,
    plan: BatchPlan,
    cfg: ModelConfig,
    impl: str,
) -> jax.Array:
    q_latent = mla.absorb(p.q_nope[rows])
    out_thc, _ = mla_decode(
        q_latent,
        p.q_rope[rows],
        cache,
        layer,
        part.page_table,
        part.cached_lens,
        part.query_starts,
        plan.decode,
        scale=cfg.softmax_scale,
        impl=impl,
    )
    return mla.unabsorb(out_thc)


def _expanded(
    mla: Mla,
    p: Queries,
    rows: slice,
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    part: RaggedBatch,
    plan: BatchPlan,
    cfg: ModelConfig,
    impl: str,
) -> jax.Array:
    assert plan.prefill is not None
    latent_bsc, rope_bsp = gather_rows(cache, layer, part.page_table)
    latent_sc = latent_bsc.reshape(-1, latent_bsc.shape[-1]).astype(p.q_nope.dtype)
    rope_sp = rope_bsp.reshape(-1, rope_bsp.shape[-1]).astype(p.q_rope.dtype)
    # Unused rows may hold NaN; they are cleared before the product so that none can spread through
    # a reduction.
    latent_sc = jnp.where(plan.prefill.used_keys()[:, None], latent_sc, 0)
    k_nope, v = mla.expand(latent_sc, impl=impl)
    out_thv, _ = mla_prefill(
        p.q_nope[rows],
        p.q_rope[rows],
        k_nope,
        rope_sp,
        v,
        plan.prefill,
        scale=cfg.softmax_scale,
        with_lse=False,
        impl=impl,
    )
    return out_thv
