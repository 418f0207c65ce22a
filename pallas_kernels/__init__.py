"""GPU kernels of dskjax and their meaning in plain JAX: arrays and tiles in, arrays out; no model
is known here.
"""

from pallas_kernels.act_quant import act_quant
from pallas_kernels.expert_mlp import expert_mlp
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.matmul import matmul
from pallas_kernels.mla_decode import (
    MlaDecodePlan,
    mla_decode,
    plan_mla_decode,
    schedule_mla_decode,
)
from pallas_kernels.mla_prefill import BlockList, MlaPrefillPlan, mla_prefill
from pallas_kernels.norm_rope_cache import norm_rope_cache
from pallas_kernels.peer_exchange import peer_exchange
from pallas_kernels.quant import QTensor, Recipe, dequantise, quantise
from pallas_kernels.router import route
from pallas_kernels.select import Impl
from pallas_kernels.swiglu import swiglu

__all__ = [
    "BlockList",
    "Impl",
    "LatentCache",
    "MlaDecodePlan",
    "MlaPrefillPlan",
    "QTensor",
    "Recipe",
    "act_quant",
    "dequantise",
    "expert_mlp",
    "grouped_matmul",
    "matmul",
    "mla_decode",
    "mla_prefill",
    "norm_rope_cache",
    "peer_exchange",
    "plan_mla_decode",
    "quantise",
    "route",
    "schedule_mla_decode",
    "swiglu",
]
