"""`expert_mlp` by groups: rows sorted by expert, two grouped products, rows sorted back. With
`impl="reference"` this is the meaning of the op.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quant import QTensor
from pallas_kernels.swiglu import swiglu


def expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: jax.Array | QTensor,
    down: jax.Array | QTensor,
    *,
    impl: str,
) -> jax.Array:
    """See `api.expert_mlp`; `impl` is that of the grouped products."""
    tokens, per_token = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    back = jnp.argsort(order)  # where each (token, k) went
    # A comparison, not a bincount: no scatter of a whole batch into a few bins.
    is_of_expert = flat[:, None] == jnp.arange(down.shape[0])
    sizes = is_of_expert.sum(axis=0, dtype=jnp.int32)
    rows_md = _copies(x, order, back)
    hidden = swiglu(grouped_matmul(rows_md, gate_up, sizes, impl=impl))
    out_md = grouped_matmul(hidden, down, sizes, impl=impl)
    out_tkd = _reorder(out_md, back, order).reshape(tokens, per_token, -1).astype(jnp.float32)
    weighted = jnp.einsum("tkd,tk->td", out_tkd, weights.astype(jnp.float32), precision="highest")
    return weighted.astype(x.dtype)


@jax.custom_vjp
def _copies(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Rows of x, each as often as `order` is longer than x, in that order; backwards a sum."""
    return x[order // (order.shape[0] // x.shape[0])]


def _copies_backward(
    saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None, None]:
    x, back = saved
    grad_tkd = grad[back].reshape(x.shape[0], -1, x.shape[1])
    return grad_tkd.astype(jnp.float32).sum(axis=1).astype(x.dtype), None, None


_copies.defvjp(lambda x, order, back: (_copies(x, order, back), (x, back)), _copies_backward)


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[order], where `back` undoes `order`."""
    return x[order]


_reorder.defvjp(
    lambda x, order, back: (x[order], back), lambda back, grad: (grad[back], None, None)
)
