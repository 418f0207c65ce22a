"""Multi-head latent attention (DeepSeek-V2 report, section 2.1; spelled out in its appendix C).

    c_q   = norm(W_DQ x)            q   = W_UQ c_q  = [q_nope | q_rope] per head
    c_kv  = norm(W_DKV x)           k_rope = RoPE(W_KR x), one for all heads
    expanded:  [k_nope | v] = W_UKV c_kv per head,  score = q_nope . k_nope + q_rope . k_rope,  out
    = W_O (P v) absorbed:  q_lat = W_UK^T q_nope,  score = q_lat . c_kv + q_rope . k_rope,
           out = W_O W_UV (P c_kv)

Only c_kv (after its norm) and k_rope (after rotation) are cached. Both forms give the same numbers;
the expanded one does fewer operations per pair of tokens, the absorbed one reads nothing but the
cache. The softmax scale is that of the expanded head, qk_head_dim^-0.5 times YaRN's mscale squared,
in both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dskjax.config import ModelConfig
from dskjax.layers.norm import RmsNorm
from dskjax.params import Module, weight
from pallas_kernels import LatentCache, dequantise, matmul, norm_rope_cache
from pallas_kernels.norm_rope_cache.xla import norm_rope
from pallas_kernels.rope import rotate

Tables = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Queries:
    """Of each token and head, the rope part rotated."""

    q_nope: Float[Array, "T H N"]
    q_rope: Float[Array, "T H P"]


@dataclasses.dataclass(frozen=True)
class Projected(Queries):
    """What one layer needs of its tokens: queries per head, and the row that a cache would hold."""

    latent: Float[Array, "T C"]
    k_rope: Float[Array, "T P"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of tokens go in the cache.

    Attributes:
        layer: of the pool.
        pages: of each token; one outside the pool drops the row.
        slots: places in the pages.
    """

    layer: Int[Array, ""] | int
    pages: Int[Array, " T"]
    slots: Int[Array, " T"]


class Mla(Module):
    """Projections of latent attention. Attending itself is `mla_prefill` or `mla_decode`; see
    `dskjax.attention`.
    """

    def __init__(self, cfg: ModelConfig):
        mla, heads, d = cfg.mla, cfg.num_attention_heads, cfg.hidden_size
        self.cfg = cfg
        if mla.q_lora_rank is None:
            self.q_proj = weight((heads * mla.qk_head_dim, d), axes=("heads", "embed"))
        else:
            self.q_a_proj = weight((mla.q_lora_rank, d), axes=("q_latent", "embed"))
            self.q_a_layernorm = RmsNorm(mla.q_lora_rank, mla.norm_eps, "q_latent")
            self.q_b_proj = weight(
                (heads * mla.qk_head_dim, mla.q_lora_rank), axes=("heads", "q_latent")
            )
        self.kv_a_proj_with_mqa = weight(
            (mla.kv_lora_rank + mla.qk_rope_head_dim, d), axes=("latent", "embed")
        )
        self.kv_a_layernorm = RmsNorm(mla.kv_lora_rank, mla.norm_eps, "latent")
        self.kv_b_proj = weight(
            (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
            axes=("heads", "latent"),
        )
        self.o_proj = weight((d, heads * mla.v_head_dim), axes=("embed", "heads"))

    def project(self, x_td: Float[Array, "T D"], tables: Tables, *, impl: str) -> Projected:
        """Queries, latent and rope key of each token, rotated to its position."""
        q_a, kv_a = self._compress(x_td, impl)
        with jax.named_scope("q"):
            queries = self._queries(x_td if q_a is None else self.q_a_layernorm(q_a), tables, impl)
        with jax.named_scope("kv"):
            norm = self.kv_a_layernorm
            latent, k_rope = norm_rope(kv_a, norm.weight[...], tables, norm.eps)
        return Projected(queries.q_nope, queries.q_rope, latent, k_rope)

    def project_into(
        self,
        cache: LatentCache,
        rows: Rows,
        x_td: Float[Array, "T D"],
        tables: Tables,
        *,
        impl: str,
    ) -> tuple[Queries, LatentCache]:
        """`project`, with latents and rope keys written to the cache."""
        q_a, kv_a = self._compress(x_td, impl)
        c_q, written = norm_rope_cache(
            q_a,
            None if q_a is None else self.q_a_layernorm.weight[...],
            kv_a,
            self.kv_a_layernorm.weight[...],
            tables,
            cache,
            rows.layer,
            rows.pages,
            rows.slots,
            eps=self.cfg.mla.norm_eps,
            impl=impl,
        )
        with jax.named_scope("q"):
            return self._queries(x_td if c_q is None else c_q, tables, impl), written

    def _compress(self, x_td: jax.Array, impl: str) -> tuple[jax.Array | None, jax.Array]:
        """W_DQ x, None where queries are not compressed, and [W_DKV; W_KR] x."""
        with jax.named_scope("compress"):
            q_a = None
            if self.cfg.mla.q_lora_rank is not None:
                q_a = matmul(x_td, self.q_a_proj[...], impl=impl)
            return q_a, matmul(x_td, self.kv_a_proj_with_mqa[...], impl=impl)

    def _queries(self, c_q: jax.Array, tables: Tables, impl: str) -> Queries:
        """Of c_q, or of x where queries are not compressed."""
        mla = self.cfg.mla
        weight = self.q_proj if mla.q_lora_rank is None else self.q_b_proj
        q = matmul(c_q, weight[...], impl=impl)
        q_thd = q.reshape(c_q.shape[0], self.cfg.num_attention_heads, mla.qk_head_dim)
        q_nope, q_rope = jnp.split(q_thd, [mla.qk_nope_head_dim], axis=-1)  # nope first
        return Queries(q_nope, rotate(q_rope, tables))

    def expand(
        self, latent_sc: Float[Array, "S C"], *, impl: str
    ) -> tuple[Float[Array, "S H N"], Float[Array, "S H V"]]:
        """k_nope and v per head from latents: rows of W_UKV are k then v within each head."""
        mla = self.cfg.mla
        kv = matmul(latent_sc, self.kv_b_proj[...], impl=impl)
        kv_shd = kv.reshape(latent_sc.shape[0], self.cfg.num_attention_heads, -1)
        k_nope, v = jnp.split(kv_shd, [mla.qk_nope_head_dim], axis=-1)
        return k_nope, v

    def absorb(self, q_nope_thn: Float[Array, "T H N"]) -> Float[Array, "T H C"]:
        """Queries in latent space: W_UK^T q_nope."""
        with jax.named_scope("absorb_q"):
            w_uk_hnc, _ = self._up(q_nope_thn.dtype)
            out = jnp.einsum(
                "thn,hnc->thc", q_nope_thn, w_uk_hnc, preferred_element_type=jnp.float32
            )
            return out.astype(q_nope_thn.dtype)

    def unabsorb(self, out_thc: Float[Array, "T H C"]) -> Float[Array, "T H V"]:
        """Head outputs from latent outputs: W_UV (P c)."""
        with jax.named_scope("absorb_v"):
            _, w_uv_hvc = self._up(out_thc.dtype)
            out = jnp.einsum("thc,hvc->thv", out_thc, w_uv_hvc, preferred_element_type=jnp.float32)
            return out.astype(out_thc.dtype)

    def output(self, out_thv: Float[Array, "T H V"], *, impl: str) -> Float[Array, "T D"]:
        """W_O over the concatenated heads."""
        return matmul(out_thv.reshape(out_thv.shape[0], -1), self.o_proj[...], impl=impl)

    def _up(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        mla = self.cfg.mla
        per_head = dequantise(self.kv_b_proj[...], dtype).reshape(
            self.cfg.num_attention_heads, -1, mla.kv_lora_rank
        )
        return per_head[:, : mla.qk_nope_head_dim], per_head[:, mla.qk_nope_head_dim :]
