"""Weights that the implementation for Hopper takes, and how it quantizes rows for them."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.act_quant.api import LONGEST_ROW
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.grouped_matmul.api import hopper_refusal as product_refusal
from pallas_kernels.quant import FP8_TILE, FP8_TOKEN, QTensor, Recipe, quantise
from pallas_kernels.select import too_large


def row_recipe(weight: QTensor | PackedInt4) -> Recipe:
    """How rows are quantized for such a weight."""
    return FP8_TOKEN if isinstance(weight, PackedInt4) else FP8_TILE


def num_rows(experts: jax.Array, pairs: int | None) -> int:
    """Rows of the products."""
    return experts.size if pairs is None else min(pairs, experts.size)


def hopper_refusal(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: jax.Array | QTensor | PackedInt4,
    down: jax.Array | QTensor | PackedInt4,
    pairs: int | None = None,
) -> str | None:
    """Why the implementation for Hopper cannot take these arguments (on such a device), or None."""
    if isinstance(gate_up, jax.Array) and isinstance(down, jax.Array):
        return product_refusal(x, gate_up) or product_refusal(x, down)
    if not isinstance(gate_up, QTensor | PackedInt4) or not isinstance(down, QTensor | PackedInt4):
        return "needs both weights quantized, or neither"
    if x.dtype != jnp.bfloat16:
        return f"needs bfloat16 rows, not {x.dtype}"
    if isinstance(gate_up, PackedInt4) != isinstance(down, PackedInt4):
        return f"needs both weights e4m3 or both packed, not {_kind(gate_up)} and {_kind(down)}"
    rows, width, recipe = num_rows(experts, pairs), down.shape[-1], row_recipe(gate_up)
    quantised = functools.partial(quantise, recipe=recipe)
    for name, weight in (("gate_up", gate_up), ("down", down)):
        operand = jax.ShapeDtypeStruct((rows, weight.shape[-1]), jnp.bfloat16)
        if refusal := product_refusal(jax.eval_shape(quantised, operand), weight):
            return f"{name}: {refusal}"
    if not recipe.block[1] and width > LONGEST_ROW:
        return f"needs at most {LONGEST_ROW} hidden channels for a scale per row, not {width}"
    return too_large((rows, 2 * width))


def _kind(weight: QTensor | PackedInt4) -> str:
    return "packed int4" if isinstance(weight, PackedInt4) else weight.format
