"""`expert_mlp` by groups: rows sorted by expert, two grouped products, rows sorted back. With
`impl="reference"` this is the meaning of the op.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import PackedInt4, grouped_matmul
from pallas_kernels.quant import QTensor
from pallas_kernels.swiglu import swiglu


def expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: jax.Array | QTensor | PackedInt4,
    down: jax.Array | QTensor | PackedInt4,
    pairs: int | None = None,
    *,
    impl: str,
) -> jax.Array:
    """See `api.expert_mlp`; `impl` is that of the grouped products."""
    tokens, per_token = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(jnp.where(flat < 0, down.shape[0], flat), stable=True)  # no expert: last
    back = jnp.argsort(order)  # where each (token, k) went
    # A comparison, not a bincount: no scatter of a whole batch into a few bins.
    is_of_expert = flat[:, None] == jnp.arange(down.shape[0])
    sizes = is_of_expert.sum(axis=0, dtype=jnp.int32)
    order = order[:pairs]
    rows_md = _copies(x, order, back)
    hidden = swiglu(grouped_matmul(rows_md, gate_up, sizes, impl=impl))
    out_md = grouped_matmul(hidden, down, sizes, impl=impl)
    out_tkd = _back(out_md, order, back).reshape(tokens, per_token, -1)
    return _weighted_sum(out_tkd, weights)


@jax.checkpoint
def _weighted_sum(out_tkd: jax.Array, weights_tk: jax.Array) -> jax.Array:
    """In fp32, which the backward pass makes again: only the arguments are kept for it."""
    wide = out_tkd.astype(jnp.float32) * weights_tk.astype(jnp.float32)[..., None]
    return wide.sum(axis=1).astype(out_tkd.dtype)


@jax.custom_vjp
def _copies(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Rows of x, one for each pair of `order`; backwards a sum. `back` is the place of each pair
    in `order`, past its end if it was left out.
    """
    return x[order // (back.shape[0] // x.shape[0])]


def _copies_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None, None]:
    x, back = saved
    grad_tkd = _place(grad, back).reshape(x.shape[0], -1, x.shape[1])
    return grad_tkd.astype(jnp.float32).sum(axis=1).astype(x.dtype), None, None


_copies.defvjp(lambda x, order, back: (_copies(x, order, back), (x, back)), _copies_backward)


@jax.custom_vjp
def _back(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Each pair's row again, in the order of pairs; 0 for those left out."""
    return _place(x, back)


_back.defvjp(
    lambda x, order, back: (_back(x, order, back), order),
    lambda order, grad: (grad[order], None, None),
)


def _place(x: jax.Array, back: jax.Array) -> jax.Array:
    return x.at[back].get(mode="fill", fill_value=0)
