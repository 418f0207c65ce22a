"""Mixture of experts: gate, routed experts, shared experts (DeepSeek-V3 report, section 2.1.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dskjax.config import MoeConfig
from dskjax.expert_parallel import Exchange
from dskjax.expert_parallel.replicas import physical
from dskjax.layers.mlp import SwiGlu
from dskjax.params import Module, weight
from pallas_kernels import expert_mlp, route


class Gate(Module):
    """Scores of tokens for experts, in fp32 whatever the compute dtype; the selection bias stays
    fp32 too.
    """

    def __init__(self, hidden_size: int, moe: MoeConfig):
        self.moe = moe
        self.weight = weight((moe.n_routed_experts, hidden_size), axes=(None, "embed"))
        if moe.topk_method == "noaux_tc":
            self.e_score_correction_bias = weight(
                (moe.n_routed_experts,), axes=(None,), init="zeros", dtype="float32"
            )

    def __call__(
        self, x: Float[Array, "T D"], *, impl: str
    ) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
        """Weights float32 and chosen experts of each row."""
        logits_te = _logits(x, self.weight[...])
        moe = self.moe
        limited = moe.topk_method != "greedy"
        return route(
            logits_te,
            self.e_score_correction_bias[...] if moe.topk_method == "noaux_tc" else None,
            top_k=moe.num_experts_per_tok,
            scoring_func=moe.scoring_func,
            n_group=moe.n_group if limited else 1,
            topk_group=moe.topk_group if limited else 1,
            norm_topk_prob=moe.norm_topk_prob,
            routed_scaling_factor=moe.routed_scaling_factor,
            impl=impl,
        )


@jax.checkpoint  # keeps x as it is for the backward pass, not in fp32
def _logits(x: jax.Array, weight_ed: jax.Array) -> jax.Array:
    wide = (a.astype(jnp.float32) for a in (x, weight_ed))
    return jnp.einsum("td,ed->te", *wide, precision="highest")


class Experts(Module):
    """The routed experts, their gate and up as one weight; how rows reach them is the op's.

    With redundant experts the weights are those of slots, and two maps, which are inputs like any
    weight, say which slots hold an expert: `replicas`, padded with -1, and `replica_counts`.
    """

    def __init__(self, hidden_size: int, moe: MoeConfig):
        slots, width = moe.num_slots, moe.moe_intermediate_size
        self.gate_up_proj = weight(
            (slots, 2, width, hidden_size), axes=("experts", None, "mlp", "expert_embed")
        )
        self.down_proj = weight(
            (slots, hidden_size, width), axes=("experts", "expert_embed", "mlp")
        )
        self.redundant = moe.num_redundant_experts
        if self.redundant:
            experts, most = moe.n_routed_experts, 1 + self.redundant
            self.replicas = weight((experts, most), axes=(None, None), init="zeros", dtype="int32")
            self.replica_counts = weight((experts,), axes=(None,), init="zeros", dtype="int32")

    def __call__(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T K"],
        experts: Int[Array, "T K"],
        *,
        impl: str,
        exchange: Exchange | None = None,
    ) -> Float[Array, "T D"]:
        """Weighted sum of each row's experts, wherever `exchange` keeps them; row t takes an
        expert's replica t modulo their number.
        """
        if self.redundant:
            experts = physical(experts, self.replicas[...], self.replica_counts[...])
        run = expert_mlp if exchange is None else exchange.experts
        return run(x, weights, experts, self.gate_up_proj[...], self.down_proj[...], impl=impl)


class Moe(Module):
    """Routed plus shared experts; the shared ones are one wide MLP, added without gate or
    scaling.
    """

    def __init__(self, hidden_size: int, moe: MoeConfig):
        self.gate = Gate(hidden_size, moe)
        self.experts = Experts(hidden_size, moe)
        self.shared_experts = (
            SwiGlu(hidden_size, moe.n_shared_experts * moe.moe_intermediate_size)
            if moe.n_shared_experts
            else None
        )

    def __call__(
        self,
        x: Float[Array, "T D"],
        real: Bool[Array, " T"] | None = None,
        *,
        impl: str,
        exchange: Exchange | None = None,
    ) -> tuple[Float[Array, "T D"], Int[Array, "T K"]]:
        """Returns the output and the chosen experts, int32 [T, K]; -1 for rows that are not `real`:
        padding goes to no expert.
        """
        with jax.named_scope("gate"):
            weights, experts = self.gate(x, impl=impl)
            if real is not None:
                experts = jnp.where(real[:, None], experts, -1)
        with jax.named_scope("experts"):
            out = self.experts(x, weights, experts, impl=impl, exchange=exchange)
        if self.shared_experts is not None:
            with jax.named_scope("shared_experts"):
                out = out + self.shared_experts(x, impl=impl)
        return out, experts
