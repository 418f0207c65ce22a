"""What a part's two sides compute on their devices: the checksum of `serve.transfer.checks`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from serve.transfer.checks import FOLD, WEIGHT


@jax.jit
def device_checksum(arrays: Any, pages: jax.Array | None = None) -> jax.Array:
    """`checks.checksum` on the device: uint32 scalar, leaves in pytree order.

    Args:
        arrays: a part's arrays; 8-byte elements are refused.
        pages: int32 scalar, see there; None counts all.

    Raises:
        NotImplementedError: an array has 8-byte elements.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(arrays):
        if leaf.dtype.itemsize > 4:
            raise NotImplementedError(f"checksum of {leaf.dtype}: caches have at most 4 bytes")
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jax.lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape)
        terms = (bits + jnp.uint32(1)) * ((place * jnp.uint32(WEIGHT)) | jnp.uint32(1))
        if pages is not None and leaf.ndim >= 2:
            column = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, 1)
            terms = jnp.where(column < pages, terms, jnp.uint32(0))
        total = total * jnp.uint32(FOLD) + jnp.sum(terms, dtype=jnp.uint32)
    return total


def corrupt_arrays(arrays: Any) -> Any:
    """A copy on the same devices in which the first byte of the first leaf is changed."""
    leaves, tree = jax.tree.flatten(arrays)
    first = np.array(leaves[0])
    first.reshape(-1).view(np.uint8)[:1] ^= 0x55
    sharding = getattr(leaves[0], "sharding", None)
    leaves[0] = first if sharding is None else jax.device_put(first, sharding)
    return jax.tree.unflatten(tree, leaves)
