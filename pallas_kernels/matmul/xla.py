"""`matmul` in plain JAX: quantized weights are dequantized to the dtype of x."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Weight, dequantise


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """See `api.matmul`."""
    return accumulate(x, dequantise(w, x.dtype)).astype(x.dtype)


def contract(x: jax.Array, w: jax.Array, **kwargs: Any) -> jax.Array:
    """Over the last axis of both."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())), **kwargs)


@jax.custom_vjp
def accumulate(x: jax.Array, w: jax.Array) -> jax.Array:
    """`contract` with an fp32 result.

    Gradients are products of arrays in the dtypes of x and w, accumulated in fp32: the cotangent is
    rounded to that of x. JAX would multiply it in fp32, which an H100 does in tf32 at half the
    speed, even where it was made from 16 bits.
    """
    return contract(x, w, preferred_element_type=jnp.float32)


def _backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    grad, rows, columns = grad.astype(x.dtype), x.ndim - 1, w.ndim - 1
    over_columns = (tuple(range(rows, rows + columns)), tuple(range(columns)))
    over_rows = (tuple(range(rows)), tuple(range(rows)))
    dx = jax.lax.dot_general(grad, w, (over_columns, ((), ())), preferred_element_type=jnp.float32)
    dw = jax.lax.dot_general(grad, x, (over_rows, ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


accumulate.defvjp(lambda x, w: (accumulate(x, w), (x, w)), _backward)
