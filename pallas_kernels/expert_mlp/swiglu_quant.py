"""SwiGLU's gate and the quantization of its result, as one kernel in Triton: hidden rows are
written once, in e4m3.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.quant import QTensor, Recipe, quantise
from pallas_kernels.swiglu import swiglu
from pallas_kernels.triton_ops import compiler_params
from pallas_kernels.triton_quant import quantise_tiles

ELEMENTS = 2048
"""Of a program's results, at least; one tile if that is longer."""
PER_THREAD = 16


def reference(gate_up: Float[Array, "M 2 F"], recipe: Recipe) -> QTensor:
    """The meaning of `swiglu_quant`, in fp32."""
    return quantise(swiglu(gate_up.astype(jnp.float32)), recipe)


def swiglu_quant(
    gate_up: Float[Array, "M 2 F"], recipe: Recipe, *, interpret: bool = False
) -> QTensor:
    """Quantizes silu(gate) * up, which is not rounded before.

    Args:
        gate_up: rows.
        recipe: e4m3, a scale per row and 128 or all columns; F a multiple of that.
        interpret: run on a CPU.

    Returns:
        QTensor [M, F].
    """
    rows, _, columns = gate_up.shape
    width = recipe.block[1] or columns
    assert recipe.format == "e4m3" and recipe.block[0] == 1 and columns % width == 0
    per_row, step = columns // width, pl.next_power_of_2(width)
    at_once, count = max(1, ELEMENTS // step), rows * per_row
    kernel = functools.partial(
        _kernel, recipe=recipe, width=width, step=step, at_once=at_once, interpret=interpret
    )
    values, scales = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ],
        grid=(math.ceil(count / at_once),),
        compiler_params=compiler_params(min(max(at_once * step // PER_THREAD // 32, 1), 16)),
        interpret=interpret,
        name="swiglu_quant",
    )(gate_up.reshape(rows, 2 * columns))
    return QTensor(values, scales.reshape(rows, per_row), (1, width), "e4m3")


def _kernel(
    x_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    *,
    recipe: Recipe,
    width: int,
    step: int,
    at_once: int,
    interpret: bool,
) -> None:
    rows, columns = values_ref.shape
    per_row = columns // width
    tile = pl.program_id(0) * at_once + jnp.arange(at_once)
    row, first = tile // per_row, tile % per_row * width
    within = jnp.broadcast_to(jnp.arange(step)[None], (at_once, step))
    row_tc, column = jnp.broadcast_to(row[:, None], within.shape), first[:, None] + within
    is_real = (row_tc < rows) & (within < width)
    gate, up = (
        plt.load(x_ref.at[row_tc, column + half], mask=is_real, other=0.0).astype(jnp.float32)
        for half in (0, columns)
    )
    values, scales = quantise_tiles(gate / (1 + jnp.exp(-gate)) * up, recipe, interpret)
    plt.store(values_ref.at[row_tc, column], values, mask=is_real)
    plt.store(scales_ref.at[tile], scales, mask=row < rows)
