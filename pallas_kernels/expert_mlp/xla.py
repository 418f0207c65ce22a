"""`expert_mlp` in plain JAX, by the number of rows.

A decode step has few rows, and then time is what reading the experts' weights takes:

    very few    fewer (row, expert) pairs than a third of the experts: each pair's weights are
                copied out and multiplied
    few         every row goes through every expert; up to some 300 rows (FLOP/s over bytes/s of a
                GPU, one byte of bf16 weight making one FLOP a row) that costs no more than reading
                the weights once, and nothing is sorted, copied or padded
    many        rows sorted by expert (`by_group`)

Quantized weights always go by groups.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.expert_mlp import by_group
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.quant import QTensor
from pallas_kernels.swiglu import swiglu

FEW_ROWS = 256
"""Rows up to which every row goes through every expert."""


def expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: jax.Array | QTensor | PackedInt4,
    down: jax.Array | QTensor | PackedInt4,
    pairs: int | None = None,
) -> jax.Array:
    """See `api.expert_mlp`."""
    if (
        isinstance(gate_up, QTensor | PackedInt4)
        or isinstance(down, QTensor | PackedInt4)
        or x.shape[0] > FEW_ROWS
    ):
        return by_group.expert_mlp(x, weights, experts, gate_up, down, pairs, impl="xla")
    if 3 * experts.size < down.shape[0]:
        return _by_pair(x, weights, experts, gate_up, down)
    return _every_expert(x, weights, experts, gate_up, down)


def _by_pair(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Copies out the weights of each (row, expert) pair."""
    fp32 = {"preferred_element_type": jnp.float32}
    pair = jnp.einsum("td,tkgfd->tkgf", x, gate_up[experts], **fp32).astype(x.dtype)
    out_tkd = jnp.einsum("tkf,tkdf->tkd", swiglu(pair), down[experts], **fp32).astype(x.dtype)
    out_tkd = jnp.where(experts[:, :, None] < 0, 0, out_tkd)  # -1 read some expert's weights
    return _sum(out_tkd.swapaxes(0, 1), weights.T, x.dtype)


def _every_expert(
    x: jax.Array, weights: jax.Array, experts: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """All rows through all experts; a row's weight is 0 for those it did not choose."""
    fp32 = {"preferred_element_type": jnp.float32}
    pair = jnp.einsum("td,egfd->etgf", x, gate_up, **fp32).astype(x.dtype)
    out_etd = jnp.einsum("etf,edf->etd", swiglu(pair), down, **fp32).astype(x.dtype)
    chosen_ekt = jnp.arange(down.shape[0])[:, None, None] == experts.T
    weight_et = jnp.sum(jnp.where(chosen_ekt, weights.T.astype(jnp.float32), 0), axis=1)
    # where, not a product: an expert that a row did not choose may overflow on it.
    chosen_et = jnp.any(chosen_ekt, axis=1)
    return _sum(jnp.where(chosen_et[:, :, None], out_etd, 0), weight_et, x.dtype)


def _sum(out_etd: jax.Array, weight_et: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """fp32 weighted sum over the first axis."""
    total = jnp.einsum(
        "etd,et->td",
        out_etd.astype(jnp.float32),
        weight_et.astype(jnp.float32),
        precision="highest",
    )
    return total.astype(dtype)
