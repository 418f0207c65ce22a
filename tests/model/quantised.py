"""A tiny model whose every matrix has several scale blocks, the last of them cut off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dskjax import presets
from dskjax.config import MlaConfig, MtpConfig
from dskjax.params import is_weight, named_leaves, tree_of
from dskjax.quantise import LINEARS, quantise
from pallas_kernels import QTensor, dequantise
from tests.oracles import weights

_V3 = presets.tiny_v3()
CFG = dataclasses.replace(
    _V3,
    hidden_size=160,
    intermediate_size=272,
    num_hidden_layers=3,
    mla=MlaConfig(
        q_lora_rank=136, kv_lora_rank=136, qk_nope_head_dim=40, qk_rope_head_dim=8, v_head_dim=36
    ),
    moe=dataclasses.replace(
        _V3.moe, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=144
    ),
    mtp=MtpConfig(num_nextn_predict_layers=1),
)
PRECISIONS = ("fp8", "w4afp8")


def last_part(path):
    return path.rpartition(".")[2]


@functools.cache
def plain():
    """float32 params; blocks of linear weights differ in size by up to e^1.5."""
    rng = np.random.default_rng(3)
    params = weights.stacked(weights.random_weights(CFG.to_hf()), CFG.to_hf())
    leaves = {}
    for path, value in named_leaves(params):
        if last_part(path) in LINEARS:
            *lead, n, k = value.shape
            size = np.exp(rng.uniform(-1.5, 0, (*lead, -(-n // 128), -(-k // 128))))
            size = np.repeat(np.repeat(size, 128, axis=-2), 128, axis=-1)
            value = value * np.float32(size[..., :n, :k])
        leaves[path] = jnp.asarray(value)
    return tree_of(leaves)


@functools.cache
def quantised(precision):
    return quantise(plain(), precision)


@jax.jit
def dequantised(params, dtype=jnp.float32):
    """The same params with every QTensor as the array it stands for."""
    return jax.tree.map(
        lambda w: dequantise(w) if isinstance(w, QTensor) else w, params, is_leaf=is_weight
    )


def with_leaf(params, path, change):
    """A copy of params with one leaf changed."""
    leaves = dict(named_leaves(params))
    return tree_of(leaves | {path: change(leaves[path])})
