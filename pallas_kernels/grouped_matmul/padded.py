"""Sizes of bf16 arrays that copies to shared memory for `wgmma` can take."""

import jax
import jax.numpy as jnp

BLOCK = 64
"""bf16 numbers of a block: a row of 128 bytes of shared memory."""
ROW_ALIGN = 8
"""Copies begin at a multiple of so many rows: swizzled memory repeats after them."""


def padded(x: jax.Array, *, rows: int = 0) -> jax.Array:
    """[..., M, K] with zeros after it: K is made whole blocks, M at least `rows` and a multiple of
    `ROW_ALIGN`. Most models' sizes need none.
    """
    have, columns = x.shape[-2:]
    more = (-(-max(have, rows) // ROW_ALIGN) * ROW_ALIGN - have, -columns % BLOCK)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in more]) if any(more) else x
