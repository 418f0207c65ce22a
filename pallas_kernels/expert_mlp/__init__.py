"""The routed experts of an MoE layer: each row's chosen experts, weighted and summed."""

from pallas_kernels.expert_mlp.api import expert_mlp

__all__ = ["expert_mlp"]
