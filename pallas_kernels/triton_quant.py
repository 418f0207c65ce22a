"""Quantization of tiles in registers for Triton kernels, to the bit what `quant.quantise` does."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.quant import E4M3_MAX, Recipe
from pallas_kernels.triton_ops import divide, ptx

_MAGNITUDE = 0x7FFF_FFFF
_MANTISSA = 0x007F_FFFF


def quantise_tiles(x: jax.Array, recipe: Recipe, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """e4m3 values of [tiles, columns] and fp32 scales [tiles].

    Args:
        x: fp32; columns of padding are 0.
        recipe: its floor and rounding of scales.
        interpret: on a CPU.
    """
    # As integers magnitudes have the same order, and NaN is the largest.
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    floor = int(np.float32(recipe.floor).view(np.int32))
    amax = lax.bitcast_convert_type(jnp.maximum(magnitude.max(axis=1), floor), jnp.float32)
    scale = amax * np.float32(1 / E4M3_MAX)  # what XLA makes of a division by a constant
    scale = jnp.where(scale > 0, scale, 1.0)  # NaN: as the reference does
    if recipe.ue8m0:
        up = (lax.bitcast_convert_type(scale, jnp.int32) + _MANTISSA) & ~_MANTISSA
        scale = lax.bitcast_convert_type(up, jnp.float32)
    scaled = _divide_tiles(x, scale, interpret)
    if interpret:  # on a GPU the cast itself stops at the largest value
        scaled = jnp.clip(scaled, -E4M3_MAX, E4M3_MAX)
    return scaled.astype(jnp.float8_e4m3fn), scale


def _divide_tiles(x: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    """x / scale rounded to nearest, with one division a tile (Markstein, 1990)."""
    if interpret:
        return x / scale[:, None]
    inverse = divide(jnp.ones_like(scale), scale, interpret)
    scale, inverse = (jnp.broadcast_to(v[:, None], x.shape) for v in (scale, inverse))
    near = x * inverse
    # The remainder is negated twice, so that -0 stays -0.
    exact = ptx(
        "{.reg .f32 x, r; neg.f32 x, $1; fma.rn.f32 r, $2, $4, x; neg.f32 r, r;"
        " fma.rn.f32 $0, r, $3, $4;}",
        x,
        scale,
        inverse,
        near,
    )
    return jnp.where(scale < jnp.inf, exact, near)
