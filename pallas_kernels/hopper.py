"""What our Mosaic GPU kernels for Hopper share: how matrices lie in registers and in shared memory,
and operations whose form on the GPU the interpreter on a CPU does not know.

A Pallas "thread" is a warpgroup of 128 lanes. Matrix products are `wgmma` instructions: 64 rows a
warpgroup, operands in swizzled shared memory (the left one also in registers), fp32 accumulators in
registers.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MATRIX = plgpu.Layout.WGMMA
"""How the registers of a warpgroup hold a matrix that a product reads or makes."""
ROWS = MATRIX.reduce(1)
"""How they hold one value for each row of such a matrix."""
TIMELINE_RANGES = 36
"""See `compiler_params`: 16 bytes each, of each of three warpgroups."""


def compiler_params(*, auto_barriers: bool, timeline: str | None = None) -> Any:
    """Fast exp2, no memory for reductions across warps (ours stay within four lanes).

    Args:
        auto_barriers: let the compiler put a barrier around every access to shared memory.
        timeline: a folder where each call writes when every warpgroup began and ended what the
            kernel's `jax.named_scope`s name; the first 36 of each warpgroup, which is what the
            fullest of our kernels leaves room for in shared memory. None for no such code.
    """
    return plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=0,
        unsafe_no_auto_barriers=not auto_barriers,
        profile_space=TIMELINE_RANGES if timeline else 0,
        profile_dir=timeline or "",
        profile_bounds_check=True,
    )


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory in the layout of `wgmma` operands; the last axis is cut into rows of 128 bytes,
    or of 64 for one-byte types.
    """
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


def transforms(dtype: Any) -> tuple[Any, ...]:
    """Of `swizzled`: tiles of 8 rows and 64 columns."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return tiling((8, 64)), swizzle(64 * jnp.dtype(dtype).itemsize)


SWIZZLED_ROWS: Any = (cast(Any, plgpu.SwizzleTransform)(128),)
"""Of shared memory whose last axis is 128 bytes: operands of `wgmma` that a copy may fill from any
row on, and results that a copy may take any rows of.
"""


def swizzled_rows(*shape: int, dtype: Any) -> Any:
    """Shared memory like that."""
    assert shape[-1] * jnp.dtype(dtype).itemsize == 128
    return plgpu.SMEM(shape, dtype, transforms=SWIZZLED_ROWS)


def row_values(value: float | jax.Array, rows: int = 64) -> jax.Array:
    """The same fp32 value for every row."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROWS)


def by_row(values: jax.Array, matrix: jax.Array) -> jax.Array:
    """A value for each row, spread over the columns of `matrix`."""
    return lax.broadcast_in_dim(values, matrix.shape, [0])


def accumulator(rows: int, columns: int) -> Any:
    """Registers that products add to, fp32."""
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def multiply_add(
    sums: Sequence[jax.Array], multiply: Callable[..., None], interpret: bool
) -> list[jax.Array]:
    """Continues fp32 sums: `multiply(*refs)` issues products and waits for them."""
    if not interpret:
        run = pl.run_state(lambda refs: multiply(*refs))
        results: Any = run(tuple(plgpu.WGMMAAccumulatorRef.init(s) for s in sums))
        return list(results)

    def from_zero(*refs: Any) -> list[jax.Array]:
        multiply(*refs)
        return [ref[...] for ref in refs]

    # The interpreter knows no accumulator that begins with values.
    products = pl.run_scoped(from_zero, *[accumulator(s.shape[0], s.shape[1]) for s in sums])
    return [a + b for a, b in zip(sums, products, strict=True)]
