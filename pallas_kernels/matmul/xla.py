"""`matmul` in plain JAX: quantized weights are dequantized to the dtype of x."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quant import Weight, dequantise


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """See `api.matmul`."""
    return contract(x, dequantise(w, x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def contract(x: jax.Array, w: jax.Array, **kwargs: Any) -> jax.Array:
    """Over the last axis of both."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 1,)), ((), ())), **kwargs)
