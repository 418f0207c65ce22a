"""RMSNorm with fp32 statistics."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, " d"], eps: float) -> jax.Array:
    """weight * cast(x / sqrt(mean(x^2) + eps)): normalised in fp32, cast to x's dtype, then scaled
    (Llama's order).
    """
    # Made again in the backward pass: what JAX would keep beside x are arrays of fp32.
    return jax.checkpoint(functools.partial(_rms_norm, eps=eps))(x, weight)


def _rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * normed.astype(x.dtype)
