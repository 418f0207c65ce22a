"""`grouped_matmul` in plain JAX: one batched product over a buffer of equal capacity per group.

`lax.ragged_dot` is not used: on a GPU it computes every row with every expert. Groups are copied
into [E, capacity, K] with capacity = twice the mean group; when a group is larger, the whole call
takes a slower path that walks the experts one by one, so no row is ever dropped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quant import QTensor, dequantise

CAPACITY_FACTOR = 2.0
"""Capacity of a group over the mean group size."""


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E *L K"] | QTensor, group_sizes: Int[Array, " E"]
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`."""
    rows, experts = x.shape[0], w.shape[0]
    group_sizes = group_sizes.astype(jnp.int32)
    starts = jnp.cumsum(group_sizes) - group_sizes
    x = jnp.where((jnp.arange(rows) < group_sizes.sum())[:, None], x, 0)
    capacity = min(rows, -(-int(CAPACITY_FACTOR * rows / experts) // 8) * 8 + 8)
    if capacity >= rows:
        return _by_capacity(x, w, group_sizes, starts, rows)
    return jax.lax.cond(
        group_sizes.max() <= capacity,
        lambda: _by_capacity(x, w, group_sizes, starts, capacity),
        lambda: _by_expert(x, w, group_sizes, starts),
    )


def _by_capacity(
    x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array, starts: jax.Array, capacity: int
) -> jax.Array:
    rows, experts = x.shape[0], w.shape[0]
    lead = w.shape[1:-1]
    slot = jnp.arange(capacity)
    source = jnp.where(
        slot < sizes[:, None], starts[:, None] + slot, rows
    )  # [E, capacity]; rows = nothing
    x_eck = x.at[source].get(mode="fill", fill_value=0)
    weights = dequantise(w, x.dtype).reshape(experts, -1, w.shape[-1])
    out_ecn = jnp.einsum("eck,enk->ecn", x_eck, weights, preferred_element_type=jnp.float32).astype(
        x.dtype
    )
    # Each row reads its own slot back: a gather, so the backward pass of this step is the only
    # scatter.
    row = jnp.arange(rows)
    group = jnp.clip(jnp.searchsorted(jnp.cumsum(sizes), row, side="right"), 0, experts - 1)
    out = out_ecn.reshape(experts * capacity, -1)[
        group * capacity + jnp.clip(row - starts[group], 0, capacity - 1)
    ]
    return jnp.where((row < sizes.sum())[:, None], out, 0).reshape(rows, *lead)


def _by_expert(
    x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array, starts: jax.Array
) -> jax.Array:
    rows = x.shape[0]
    row = jnp.arange(rows)

    def add(total: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        weight, size, start = expert
        mine = ((row >= start) & (row < start + size))[:, None]
        flat = dequantise(weight, x.dtype).reshape(-1, x.shape[-1])
        part = jnp.einsum(
            "mk,nk->mn", jnp.where(mine, x, 0), flat, preferred_element_type=jnp.float32
        )
        return total + part.astype(x.dtype), None

    width = 1
    for size in w.shape[1:-1]:
        width *= size
    total, _ = jax.lax.scan(
        jax.checkpoint(add), jnp.zeros((rows, width), x.dtype), (w, sizes, starts)
    )
    return total.reshape(rows, *w.shape[1:-1])
