"""Multi-token prediction modules (DeepSeek-V3 report, section 2.2; weights as DeepSeek ships them).

    u^k[i] = eh_proj [ enorm(Emb(t[i+k])) | hnorm(h^{k-1}[i]) ]        embedding first, hidden
    second h^k[i] = norm_k( Block_k(u^k)[i] )          logits^k[i] = lm_head(h^k[i])  predicts
    t[i+k+1]

h^0 is the trunk's hidden state *after* its final norm, and the chain carries h^k after
`shared_head.norm`. The report writes the concatenation the other way round; the published weights
want it so.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dskjax.config import ModelConfig
from dskjax.expert_parallel import Exchange
from dskjax.layers.block import Attend, Block
from dskjax.layers.norm import RmsNorm
from dskjax.params import Module, weight
from pallas_kernels import matmul


class MtpModule(Module):
    """One MTP module; embedding and output head belong to the trunk."""

    def __init__(self, cfg: ModelConfig):
        d = cfg.hidden_size
        self.enorm = RmsNorm(d, cfg.rms_norm_eps, "embed")
        self.hnorm = RmsNorm(d, cfg.rms_norm_eps, "embed")
        self.eh_proj = weight((d, 2 * d), axes=("embed", None))
        self.block = Block(cfg, experts=True)
        self.norm = RmsNorm(d, cfg.rms_norm_eps, "embed")

    def __call__(
        self,
        embedded: Float[Array, "T D"],
        hidden: Float[Array, "T D"],
        attend: Attend,
        real: Bool[Array, " T"] | None = None,
        *,
        impl: str,
        exchange: Exchange | None = None,
    ) -> tuple[Float[Array, "T D"], object, jax.Array]:
        """Returns h^k (after the module's norm), what `attend` carries on, and the chosen experts
        int32 [T, K].
        """
        with jax.named_scope("mtp"):
            joined = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
            x, carried, experts = self.block(
                matmul(joined, self.eh_proj[...], impl=impl),
                attend,
                real,
                impl=impl,
                exchange=exchange,
            )
            assert experts is not None
            return self.norm(x), carried, experts
