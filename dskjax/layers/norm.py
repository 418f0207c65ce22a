"""RMSNorm with fp32 statistics."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dskjax.params import Module, weight


class RmsNorm(Module):
    """y = weight * cast(x / sqrt(mean(x^2) + eps)): normalised in fp32, cast to x's dtype, then
    scaled (Llama's order).
    """

    def __init__(self, size: int, eps: float, axis: str):
        self.eps = eps
        self.weight = weight((size,), axes=(axis,), init="ones")

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)
