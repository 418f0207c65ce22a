"""Contract of `expert_mlp`: out[t] = sum_k weights[t, k] * MLP of expert experts[t, k] (x[t])."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp import by_group, xla
from pallas_kernels.expert_mlp.formats import hopper_refusal
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.quant import QTensor
from pallas_kernels.select import (
    Implementation,
    choose,
    no_hopper,
    on_gpu_only,
    whole_arrays_only,
)


def _supports_mosaic_sm90(*args: Any) -> str | None:
    return no_hopper() or hopper_refusal(*args)


def _mosaic_sm90(*args: Any) -> jax.Array:
    if isinstance(args[3], jax.Array):
        return by_group.expert_mlp(*args, impl="mosaic_sm90")
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.expert_mlp import mosaic_sm90

    return mosaic_sm90.expert_mlp(*args)


IMPLEMENTATIONS = (
    Implementation(
        "mosaic_sm90", _mosaic_sm90, auto=whole_arrays_only, supports=_supports_mosaic_sm90
    ),
    Implementation("xla", xla.expert_mlp, auto=on_gpu_only),
    Implementation("reference", functools.partial(by_group.expert_mlp, impl="reference")),
)


def expert_mlp(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int[Array, "T K"],
    gate_up: Float[Array, "E 2 F D"] | QTensor | PackedInt4,
    down: Float[Array, "E D F"] | QTensor | PackedInt4,
    *,
    pairs: int | None = None,
    impl: str = "auto",
) -> Float[Array, "T D"]:
    """Weighted sum of each row's experts, an expert being down(silu(gate x) * up x).

    Args:
        x: rows [T, D].
        weights: float32 [T, K].
        experts: i32 [T, K], ids in [0, E), -1 for none; a row may name an expert once.
        gate_up: gate and up of every expert: an array, QTensor or PackedInt4 [E, 2, F, D].
        down: [E, D, F].
        pairs: the most (row, expert) pairs there can be, when more than that many of the T * K
            choices are known to be none. With more pairs the result means nothing.
        impl: "auto", "reference", "xla" or "mosaic_sm90" (H100 and H200; bfloat16 rows; weights in
            bfloat16, which have gradients, or, and then rows go through the experts in e4m3, in
            e4m3 with a scale per 128 x 128, or packed int4; one device or whole copies on each: it
            is not partitioned by itself).

    Returns:
        [T, D] in the dtype of x; the sum over experts is fp32.

    Raises:
        NotImplementedError: the named implementation cannot run here; or a gradient with respect to
            a quantized weight is asked of "mosaic_sm90".
    """
    if not x.shape[0]:
        return x
    weights = jnp.where(experts < 0, 0, weights)
    args = (x, weights, experts, gate_up, down, pairs)
    run = choose("expert_mlp", impl, IMPLEMENTATIONS, *args)
    with jax.named_scope("expert_mlp"):
        return run(*args)
