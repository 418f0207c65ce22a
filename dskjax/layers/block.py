"""The residual block: x += Attn(norm x); x += FFN(norm x)."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.expert_parallel import Exchange
from dskjax.layers.mla import Mla
from dskjax.layers.mlp import SwiGlu
from dskjax.layers.moe import Moe
from dskjax.layers.norm import RmsNorm
from dskjax.params import Module

Attend = Callable[[Mla, jax.Array], tuple[jax.Array, Any]]
"""Runs attention with a layer's projections on normed rows [T, D]; returns [T, D] and what it
carries on (a cache).
"""


class Block(Module):
    """A decoder layer, dense or with experts. How it attends is an argument: with a cache or over
    whole sequences.
    """

    def __init__(self, cfg: ModelConfig, *, experts: bool):
        d = cfg.hidden_size
        self.input_layernorm = RmsNorm(d, cfg.rms_norm_eps, "embed")
        self.self_attn = Mla(cfg)
        self.post_attention_layernorm = RmsNorm(d, cfg.rms_norm_eps, "embed")
        if experts:
            assert cfg.moe is not None
            self.mlp = Moe(d, cfg.moe)
        else:
            self.mlp = SwiGlu(d, cfg.intermediate_size)

    def __call__(
        self,
        x_td: Float[Array, "T D"],
        attend: Attend,
        real: Bool[Array, " T"] | None = None,
        *,
        impl: str,
        exchange: Exchange | None = None,
        sharding: Sharding | None = None,
    ) -> tuple[Float[Array, "T D"], Any, jax.Array | None]:
        """Returns the residual stream, what `attend` carries on, and the chosen experts int32 [T,
        K] (None if dense; see `Moe` for `real`). Rules that split the residual stream by rows
        (`sharding`) have norms work on a device's rows alone.
        """
        inside = between = lambda x: x
        if sharding is not None:
            inside, between = sharding.inside, sharding.between
        x_td = between(x_td)
        with jax.named_scope("mla"):
            attended, carried = attend(self.self_attn, inside(self.input_layernorm(x_td)))
            x_td = x_td + between(attended)
        normed = inside(self.post_attention_layernorm(x_td))
        if isinstance(self.mlp, Moe):
            with jax.named_scope("moe"):
                out, experts = self.mlp(normed, real, impl=impl, exchange=exchange)
            return x_td + between(out), carried, experts
        with jax.named_scope("mlp"):
            return x_td + between(self.mlp(normed, impl=impl)), carried, None
