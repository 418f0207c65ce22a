"""What our Triton kernels share: the order of floats as integers, and arithmetic to the bit.

Small kernels, whose work is reductions within a warp, go through Pallas' Triton backend: a Mosaic
GPU kernel has at least 128 threads, no index of a maximum, and exchanges through shared memory. JAX
has deprecated the backend; nothing here needs more of it than loads, stores, reductions and inline
PTX, so that the kernels can move to plain Triton.

The interpreter knows no inline PTX, so helpers with `interpret` have a second form.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

LAST = jnp.iinfo(jnp.int32).min
"""Below the order of every float."""
MINUS_INFINITY = -0x7F80_0001
"""The order of -inf."""
_LARGEST = jnp.iinfo(jnp.int32).max


def compiler_params(num_warps: int) -> Any:
    """Selects the Triton backend; our kernels have no loops that loads could run ahead of."""
    return plt.CompilerParams(num_warps=num_warps, num_stages=1)


def order(x: jax.Array) -> jax.Array:
    """int32 in the order of fp32 values; NaN, of either sign, is the largest."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(x != x, _LARGEST, _flip(bits))


def value(order: jax.Array) -> jax.Array:
    """The fp32 value of an `order`."""
    return lax.bitcast_convert_type(_flip(order), jnp.float32)


def _flip(bits: jax.Array) -> jax.Array:
    return bits ^ ((bits >> 31) & _LARGEST)


def divide(x: jax.Array, y: jax.Array, interpret: bool) -> jax.Array:
    """x / y rounded to nearest; Triton's own division may be 2 ulps off."""
    if interpret:
        return x / y
    return ptx("div.rn.f32 $0, $1, $2;", *jnp.broadcast_arrays(x, y))


def sigmoid(x: jax.Array, interpret: bool) -> jax.Array:
    """To the bit what XLA makes of `jax.nn.sigmoid`."""
    exp = jnp.exp(-x)
    if interpret:
        return 1 / (1 + exp)
    # Written out: Triton would contract the addition, and XLA's reciprocal is the approximate one.
    return ptx("{.reg .f32 t; add.rn.f32 t, $1, 0f3F800000; rcp.approx.f32 $0, t;}", exp)


def ptx(code: str, *args: jax.Array) -> jax.Array:
    """Inline PTX for each element: $0 is the fp32 result, $1 and on are fp32 arguments."""
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    constraints = ",".join(["=f", *["f"] * len(args)])
    return plt.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )[0]
