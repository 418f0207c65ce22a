"""`peer_exchange` by XLA's collective, which sends whole runs."""

import jax
from jax import lax


def peer_exchange(rows: jax.Array, counts: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """See `api.peer_exchange`."""
    return (
        lax.all_to_all(rows, axis, 0, 0, tiled=True),
        lax.all_to_all(counts, axis, 0, 0, tiled=True),
    )
