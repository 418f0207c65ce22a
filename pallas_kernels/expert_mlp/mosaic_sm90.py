"""`expert_mlp` for Hopper (H100, H200) with quantized weights: rows go through the experts in e4m3.

    permute         each row is quantized once and copied to its experts     Triton
    grouped_matmul  gate and up                                              Mosaic
    swiglu_quant    the gate, and its result quantized again                 Triton
    grouped_matmul  down                                                     Mosaic
    combine         the weighted sum of each row's results, in fp32          Triton

Rows have a scale per 128 channels where weights are e4m3 with one per 128 x 128 (DeepSeek-V3
report, section 3.3), and a scale each where weights are packed int4. The results of both products
are rounded to bf16.

Backwards it is the op in plain JAX, of rows that are not quantized; quantized weights have no
gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.expert_mlp import by_group, swiglu_quant
from pallas_kernels.expert_mlp.formats import num_rows, row_recipe
from pallas_kernels.grouped_matmul import PackedInt4, grouped_matmul
from pallas_kernels.moe_permute import combine, permute, places_by_expert
from pallas_kernels.quant import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The ops that it consists of.

    Attributes:
        permute: `moe_permute.permute`.
        multiply: `grouped_matmul`.
        swiglu_quant: see there.
        combine: `moe_permute.combine`.
    """

    permute: Callable[..., QTensor]
    multiply: Callable[..., jax.Array]
    swiglu_quant: Callable[..., QTensor]
    combine: Callable[..., jax.Array]


KERNELS = Steps(
    permute=permute,
    multiply=functools.partial(grouped_matmul, impl="mosaic_sm90"),
    swiglu_quant=swiglu_quant.swiglu_quant,
    combine=combine,
)
PLAIN = Steps(
    permute=functools.partial(permute, impl="reference"),
    multiply=functools.partial(grouped_matmul, impl="reference"),
    swiglu_quant=swiglu_quant.reference,
    combine=functools.partial(combine, impl="reference"),
)
"""What they mean: the same quantization, products in fp32."""


def expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: QTensor | PackedInt4,
    down: QTensor | PackedInt4,
    pairs: int | None = None,
    *,
    steps: Steps = KERNELS,
) -> jax.Array:
    """See `api.expert_mlp`.

    Args:
        x: bf16, as there.
        weights: as there.
        experts: as there.
        gate_up: e4m3 with blocks of 128 x 128, or packed int4.
        down: likewise.
        pairs: as there.
        steps: the ops that it consists of.

    Raises:
        NotImplementedError: a gradient is asked for with respect to `gate_up` or `down`.
    """
    return _expert_mlp(x, weights, experts, gate_up, down, pairs, steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _expert_mlp(
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    gate_up: QTensor | PackedInt4,
    down: QTensor | PackedInt4,
    pairs: int | None,
    steps: Steps,
) -> jax.Array:
    rows = num_rows(experts, pairs)
    recipe = row_recipe(gate_up)
    places, sizes = places_by_expert(experts, experts=down.shape[0], rows=rows)
    rows_md = steps.permute(x, places, rows=rows, recipe=recipe)
    hidden_mf = steps.swiglu_quant(steps.multiply(rows_md, gate_up, sizes), recipe)
    out_md = steps.multiply(hidden_mf, down, sizes)
    return steps.combine(out_md, places, weights)


def _forward(
    x: Any, weights: Any, experts: Any, gate_up: Any, down: Any, pairs: int | None, steps: Steps
) -> tuple[jax.Array, Any]:
    if any(leaf.perturbed for leaf in jax.tree.leaves((gate_up, down))):
        raise NotImplementedError(
            "expert_mlp: quantized weights have no gradient; train gate_up and down as arrays, or "
            "differentiate with respect to the other arguments only"
        )
    x, weights, experts, gate_up, down = args = jax.tree.map(
        lambda leaf: leaf.value, (x, weights, experts, gate_up, down)
    )
    return _expert_mlp(x, weights, experts, gate_up, down, pairs, steps), args


def _backward(
    pairs: int | None, steps: Steps, saved: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None, None, None]:
    x, weights, experts, gate_up, down = saved

    def plain(x: jax.Array, weights: jax.Array) -> jax.Array:
        return by_group.expert_mlp(x, weights, experts, gate_up, down, pairs, impl="xla")

    _, pull = jax.vjp(plain, x, weights)
    return (*pull(grad), None, None, None)


_expert_mlp.defvjp(_forward, _backward, symbolic_zeros=True)
