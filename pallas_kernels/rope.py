"""Rotation of channels in half-split order: channel j turns with channel j + P/2."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "T *H P"], tables: tuple[Float[Array, "T half"], Float[Array, "T half"]]
) -> Float[Array, "T *H P"]:
    """Rotates half-split channels by each row's cosines and sines; computed in fp32, returned in
    x's dtype.
    """
    cos, sin = (t.reshape(t.shape[0], *(1,) * (x.ndim - 2), t.shape[1]) for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
