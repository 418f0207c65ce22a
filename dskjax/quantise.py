"""Quantised params by round-to-nearest, in the formats of public checkpoints.

    fp8      every linear weight in e4m3, a scale per 128x128 block: DeepSeek-V3's own format
    w4afp8   routed experts in int4, a scale per row and 128 inputs; the rest as in fp8

Linear weights are the projections of attention, dense MLPs, shared and routed experts, in the trunk
and in MTP modules. Embedding, head, gates, `eh_proj` and norms stay as they are, as in the
published checkpoints. Scales come from the largest magnitude alone: no calibration data is used.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from dskjax.params import Params, is_weight
from pallas_kernels import QTensor, Recipe, dequantise
from pallas_kernels import quantise as quantise_matrix
from pallas_kernels.quant import FP8_BLOCK, INT4_GROUP, Weight

Precision = Literal["fp8", "w4afp8"]

LINEARS = frozenset(
    {
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
)
"""Leaves that are quantised, by the last part of their name."""


def recipe_of(path: Sequence[str], precision: Precision) -> Recipe | None:
    """How the leaf with these names, outermost first, is quantised; None: it stays as it is.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"{precision=} must be one of {', '.join(get_args(Precision))}")
    if path[-1] not in LINEARS:
        return None
    return INT4_GROUP if precision == "w4afp8" and "experts" in path else FP8_BLOCK


def quantise(params: Params, precision: Precision) -> Params:
    """Quantises the linear weights of a model.

    A weight that is already in the wanted format stays as it is. One in another format is
    dequantised to bf16 first, matrix by matrix, which is how published W4AFP8 checkpoints are made
    from FP8 ones. Beside params and result it needs memory for a few fp32 copies of one matrix.

    Args:
        params: params of a model, stacked or from `dskjax.params.unstack`, of any float dtype;
            quantised leaves are welcome.
        precision: "fp8" or "w4afp8".

    Returns:
        The same tree with QTensors in place of the linear weights; other leaves are not copied.

    Raises:
        ValueError: an unknown precision; no linear weight in `params`; a width that int4 cannot
            pack.
    """
    found = 0

    def one(keys: tuple[Any, ...], weight: Weight) -> Weight:
        nonlocal found
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        recipe = recipe_of(names, precision)
        if recipe is None:
            return weight
        found += 1
        if _is_in(weight, recipe):
            return weight
        if recipe.format == "int4" and weight.shape[-1] % 2:
            raise ValueError(
                f"{'.'.join(names)}: int4 packs pairs of inputs, so their number must be even, but "
                f"the weight's shape is {weight.shape}; use 'fp8'"
            )
        return quantise_leaf(weight, recipe)

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)
    if not found:
        raise ValueError(
            f"params with the names {sorted(params)} hold no linear weight to quantise"
        )
    return out


def _is_in(weight: Weight, recipe: Recipe) -> bool:
    return isinstance(weight, QTensor) and (weight.format, weight.block) == (
        recipe.format,
        recipe.block,
    )


@functools.partial(jax.jit, static_argnames="recipe")
def quantise_leaf(weight: Weight, recipe: Recipe) -> QTensor:
    """Quantises a weight [..., N, K], matrix by matrix."""
    lead = weight.shape[:-2]
    matrices = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), weight)

    def one(matrix: Weight) -> QTensor:
        if isinstance(matrix, QTensor):
            # Rounds to bf16 for certain: XLA for GPUs drops a cast there and back.
            matrix = jax.lax.reduce_precision(dequantise(matrix), 8, 7)
        return quantise_matrix(matrix, recipe)

    stacked = jax.lax.map(one, matrices)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), stacked)
