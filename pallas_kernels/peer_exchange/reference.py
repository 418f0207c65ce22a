"""The meaning of `peer_exchange`: every rank sees all rows and takes its own."""

import jax
import jax.numpy as jnp
from jax import lax


def peer_exchange(rows: jax.Array, counts: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """See `api.peer_exchange`; rows past the count of a run are 0."""
    me = lax.axis_index(axis)
    counts_r = lax.all_gather(counts, axis)[:, me]
    rows_rcw = lax.all_gather(rows, axis)[:, me]
    is_there = jnp.arange(rows.shape[1]) < counts_r[:, None]
    return jnp.where(is_there[..., None], rows_rcw, jnp.zeros((), rows.dtype)), counts_r
