"""`grouped_matmul` in plain JAX: one batched product over blocks of rows that share an expert.

`lax.ragged_dot` is not used: on a GPU it computes every row with every expert. Each group is padded
to whole blocks, at most E * (block - 1) rows of padding in all, and every block is multiplied with
its expert's weight: no row is dropped, nothing branches, and the cost does not depend on balance.
Rows are moved by gathers in both directions, so there is no scatter and a GPU repeats its bits.
Axes of a weight are never merged: one that is split over devices stays so.

The weight's gradient is an fp32 [N, K] per block before it is summed per expert. Where a gradient
is wanted and that would take more than `BLOCK_SUMS_BYTES`, groups are copied into [E, capacity, K]
instead, capacity = twice the mean group; when a group is larger, that path walks the experts one by
one. (Its branch may hold collectives when rows are sharded, which XLA:CPU can run out of order and
hang on.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.packed_int4 import PackedInt4, unpacked
from pallas_kernels.quant import QTensor, dequantise

BLOCK_SUMS_BYTES = 1 << 30
"""The most that one call's weight gradients per block may take."""
CAPACITY_FACTOR = 2.0
"""Capacity of a group over the mean group size."""


def grouped_matmul(
    x: Float[Array, "M K"] | QTensor,
    w: Float[Array, "E *L K"] | QTensor | PackedInt4,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`."""
    sizes, w = group_sizes.astype(jnp.int32), unpacked(w)
    if isinstance(x, QTensor):
        x = dequantise(x, jnp.bfloat16)
    if isinstance(w, QTensor):  # never trained
        return _without_gradient(x, w, sizes)
    return _product(x, w, sizes)


def _without_gradient(x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array) -> jax.Array:
    block, blocks = blocks_of(x.shape[0], w.shape[0])
    return _by_block(x, w, sizes, block, blocks)


def blocks_of(rows: int, experts: int) -> tuple[int, int]:
    """(rows of a block, blocks) of a product without gradient: what it is padded to."""
    block = _block_rows(2 * rows, experts)  # every block copies a weight: fewer, larger ones
    return block, -(-rows // block) + experts


_product = jax.custom_vjp(_without_gradient)
_product.defvjp(
    lambda x, w, sizes: jax.vjp(lambda x, w: _with_gradient(x, w, sizes), x, w),
    lambda pull, grad: (*pull(grad), None),
)


def _with_gradient(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    rows, experts = x.shape[0], w.shape[0]
    block = _block_rows(rows, experts)
    blocks = -(-rows // block) + experts
    sums = 4 * blocks * x.shape[-1]
    for size in w.shape[1:-1]:
        sums *= size
    if sums <= BLOCK_SUMS_BYTES:
        return _by_block(x, w, group_sizes, block, blocks)
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


def _block_rows(rows: int, experts: int) -> int:
    """A power of two, about a quarter of the mean group, in 8..512."""
    target = max(8, min(512, rows // (4 * experts)))
    return 1 << (target.bit_length() - 1)


def _by_block(
    x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array, block: int, blocks: int
) -> jax.Array:
    rows, experts = x.shape[0], w.shape[0]
    starts, blocks_e = jnp.cumsum(sizes) - sizes, -(-sizes // block)
    first_e = jnp.cumsum(blocks_e) - blocks_e
    number = jnp.arange(blocks)
    expert_b = jnp.searchsorted(first_e + blocks_e, number, side="right")
    expert_b = jnp.minimum(expert_b, experts - 1)
    within = (number - first_e[expert_b])[:, None] * block + jnp.arange(block)
    source = jnp.where(  # row of each padded row; `rows` = none
        within < sizes[expert_b][:, None], starts[expert_b][:, None] + within, rows
    ).reshape(-1)
    row = jnp.arange(rows)
    expert_m = jnp.searchsorted(starts + sizes, row, side="right")
    expert_m = jnp.minimum(expert_m, experts - 1)
    target = first_e[expert_m] * block + row - starts[expert_m]  # padded row of each row
    target = jnp.where(row < sizes.sum(), target, blocks * block)

    blocks_bmk = _move(x, source, target).reshape(blocks, block, -1)
    out = _multiply(blocks_bmk, dequantise(w, x.dtype), expert_b)
    return _move(out.reshape(blocks * block, *w.shape[1:-1]), target, source)


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """out[i] = x[source[i]], 0 where that is past the end; `target` undoes `source`."""
    return x.at[source].get(mode="fill", fill_value=0)


_move.defvjp(
    lambda x, source, target: (_move(x, source, target), (source, target)),
    lambda saved, grad: (_move(grad, saved[1], saved[0]), None, None),
)


def _with_axes(equation: str, w: jax.Array | QTensor) -> str:
    """The equation with a letter for each axis of a weight [E, *L, K] in the place of "n"."""
    letters = "uvn"
    assert w.ndim - 2 <= len(letters)
    return equation.replace("n", letters[len(letters) - (w.ndim - 2) :])


@jax.custom_vjp
def _multiply(x_bmk: jax.Array, w: jax.Array, expert_b: jax.Array) -> jax.Array:
    """Each block of rows times its expert's weight."""
    equation = _with_axes("bmk,bnk->bmn", w)
    out = jnp.einsum(equation, x_bmk, w[expert_b], preferred_element_type=jnp.float32)
    return out.astype(x_bmk.dtype)


def _multiply_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_bmk, w, expert_b = saved
    fp32 = {"preferred_element_type": jnp.float32}
    dx = jnp.einsum(_with_axes("bmn,bnk->bmk", w), grad, w[expert_b], **fp32)
    dw_b = jnp.einsum(_with_axes("bmn,bmk->bnk", w), grad, x_bmk, **fp32)
    is_mine_eb = (jnp.arange(w.shape[0])[:, None] == expert_b).astype(jnp.float32)
    dw = jnp.einsum(_with_axes("eb,bnk->enk", w), is_mine_eb, dw_b, precision="highest")
    return dx.astype(x_bmk.dtype), dw.astype(w.dtype), None


_multiply.defvjp(lambda x, w, e: (_multiply(x, w, e), (x, w, e)), _multiply_backward)


def _by_capacity(
    x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array, starts: jax.Array, capacity: int
) -> jax.Array:
    rows, experts = x.shape[0], w.shape[0]
    slot = jnp.arange(capacity)
    source = jnp.where(
        slot < sizes[:, None], starts[:, None] + slot, rows
    )  # [E, capacity]; rows = nothing
    x_eck = x.at[source].get(mode="fill", fill_value=0)
    out = jnp.einsum(
        _with_axes("eck,enk->ecn", w),
        x_eck,
        dequantise(w, x.dtype),
        preferred_element_type=jnp.float32,
    ).astype(x.dtype)
    # Each row reads its own slot back: a gather, so the backward pass of this step is the only
    # scatter.
    row = jnp.arange(rows)
    group = jnp.clip(jnp.searchsorted(jnp.cumsum(sizes), row, side="right"), 0, experts - 1)
    out = out.reshape(experts * capacity, *w.shape[1:-1])[
        group * capacity + jnp.clip(row - starts[group], 0, capacity - 1)
    ]
    used = (row < sizes.sum()).reshape(-1, *[1] * (out.ndim - 1))
    return jnp.where(used, out, 0)


def _by_expert(
    x: jax.Array, w: jax.Array | QTensor, sizes: jax.Array, starts: jax.Array
) -> jax.Array:
    rows = x.shape[0]
    row = jnp.arange(rows)

    def add(total: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        weight, size, start = expert
        mine = ((row >= start) & (row < start + size))[:, None]
        part = jnp.einsum(
            _with_axes("mk,nk->mn", w),
            jnp.where(mine, x, 0),
            dequantise(weight, x.dtype),
            preferred_element_type=jnp.float32,
        )
        return total + part.astype(x.dtype), None

    nothing = jnp.zeros((rows, *w.shape[1:-1]), x.dtype)
    return jax.lax.scan(jax.checkpoint(add), nothing, (w, sizes, starts))[0]
