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
from jaxtyping import Array, Float

from dskjax.config import ModelConfig
from dskjax.layers.norm import RmsNorm
from dskjax.layers.rope import rotate
from dskjax.params import Module, weight
from pallas_kernels import dequantise, matmul

Tables = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Projected:
    """What one layer needs of its tokens: queries per head, and the row that goes to the cache."""

    q_nope: Float[Array, "T H N"]
    q_rope: Float[Array, "T H P"]
    latent: Float[Array, "T C"]
    k_rope: Float[Array, "T P"]


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
        mla = self.cfg.mla
        with jax.named_scope("q"):
            if mla.q_lora_rank is None:
                q = matmul(x_td, self.q_proj[...], impl=impl)
            else:
                c_q = self.q_a_layernorm(matmul(x_td, self.q_a_proj[...], impl=impl))
                q = matmul(c_q, self.q_b_proj[...], impl=impl)
            q_thd = q.reshape(x_td.shape[0], self.cfg.num_attention_heads, mla.qk_head_dim)
            q_nope, q_rope = jnp.split(q_thd, [mla.qk_nope_head_dim], axis=-1)  # nope first
        with jax.named_scope("kv"):
            c_kv, k_rope = jnp.split(
                matmul(x_td, self.kv_a_proj_with_mqa[...], impl=impl), [mla.kv_lora_rank], axis=-1
            )
            latent = self.kv_a_layernorm(c_kv)  # the rope key is not normed
        return Projected(q_nope, rotate(q_rope, tables), latent, rotate(k_rope, tables))

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
