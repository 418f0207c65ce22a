"""The meaning of `permute` and `combine`, in fp32."""

import jax
import jax.numpy as jnp

from pallas_kernels.quant import QTensor, Recipe, quantise


def permute(
    x: jax.Array, places: jax.Array, channel_scale: jax.Array | None, *, rows: int, recipe: Recipe
) -> QTensor:
    """See `api.permute`; rows that no place names are 0 with scale 0."""
    x = x.astype(jnp.float32)
    if channel_scale is not None:
        x *= channel_scale.astype(jnp.float32)
    q = quantise(x, recipe)

    def copied(rows_td: jax.Array) -> jax.Array:
        out = jnp.zeros((rows, rows_td.shape[1]), rows_td.dtype)
        return out.at[jnp.where(places < 0, rows, places)].set(rows_td[:, None], mode="drop")

    return QTensor(copied(q.values), copied(q.scales), q.block, q.format)


def combine(y: jax.Array, places: jax.Array, weights: jax.Array) -> jax.Array:
    """See `api.combine`."""
    rows = jnp.where(places < 0, y.shape[0], places)
    y_tkd = y.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
    # where, not a product: the weight of a row that is left out may be anything.
    is_there = (0 <= places) & (places < y.shape[0])
    weighted = jnp.where(is_there[..., None], y_tkd * weights.astype(jnp.float32)[..., None], 0)
    return weighted.sum(axis=1).astype(y.dtype)
