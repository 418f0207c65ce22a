"""Contract of `matmul`: x @ w.T with w stored [..., N, K] as in checkpoints."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quant import QTensor, Weight, dequantise
from pallas_kernels.select import Implementation, choose, on_gpu_only


def _reference(x: jax.Array, w: Weight) -> jax.Array:
    out = _contract(x.astype(jnp.float32), dequantise(w), precision="highest")
    return out.astype(x.dtype)


def _xla(x: jax.Array, w: Weight) -> jax.Array:
    return _contract(x, dequantise(w, x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def _contract(x: jax.Array, w: jax.Array, **kwargs) -> jax.Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())), **kwargs)


IMPLEMENTATIONS = (
    Implementation("xla", _xla, auto=on_gpu_only),
    Implementation("reference", _reference),
)


def matmul(
    x: Float[Array, "*T K"], w: Float[Array, "*L K"] | QTensor, *, impl: str = "auto"
) -> Float[Array, "..."]:
    """Product over the last axis of both: out[..., l] = sum_k x[..., k] w[l, k].

    Args:
        x: activations [..., K].
        w: an array or QTensor [..., N, K]; leading axes (the gate/up pair of an MLP, say) appear in
            the output in order. A QTensor is dequantized block by block: fp32 in `reference`,
                rounded to x's dtype in `xla`.
        impl: "auto", "reference" or "xla".

    Returns:
        [..., *w.shape[:-1]] in the dtype of x, accumulated in fp32.

    Raises:
        ValueError: the contracted sizes differ.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"matmul: x has K={x.shape[-1]} but w has K={w.shape[-1]} (shapes {x.shape} and "
            f"{w.shape})"
        )
    return choose("matmul", impl, IMPLEMENTATIONS, x, w)(x, w)
