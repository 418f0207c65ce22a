"""Contract of `grouped_matmul`: rows sorted by expert times that expert's weight."""

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.grouped_matmul.packed_int4 import PackedInt4
from pallas_kernels.quant import QTensor
from pallas_kernels.select import (
    Implementation,
    choose,
    no_hopper,
    on_gpu_only,
    whole_arrays_only,
)


def hopper_refusal(
    x: jax.Array | QTensor, w: jax.Array | QTensor | PackedInt4, *_: Any
) -> str | None:
    """Why the kernels for Hopper cannot take these arguments (on such a device), or None."""
    if isinstance(x, QTensor):
        if not isinstance(w, QTensor | PackedInt4):
            return "needs x and w both quantized, or neither"
        refusal = _packed_refusal(x, w) if isinstance(w, PackedInt4) else _fp8_refusal(x, w)
        kinds = {x.scales.dtype, w.scales.dtype}
        if not refusal and kinds != {jnp.dtype(jnp.float32)}:
            refusal = f"needs float32 scales, not {x.scales.dtype} and {w.scales.dtype}"
    elif isinstance(w, QTensor | PackedInt4):
        return "needs x and w both quantized, or neither"
    else:
        refusal = _bf16_refusal(x, w)
    if not refusal and not (x.shape[0] and w.shape[0]):
        refusal = f"needs rows and experts, not {x.shape[0]} and {w.shape[0]}"
    return refusal


def _fp8_refusal(x: QTensor, w: QTensor) -> str | None:
    wanted = (("e4m3", (1, 128)), ("e4m3", (128, 128)))
    got = ((x.format, x.block), (w.format, w.block))
    if got != wanted:
        hint = "; int4 w must be packed, see `pack`" if w.format == "int4" else ""
        return (
            f"needs (format, block) {wanted[0]} of x and {wanted[1]} of w, not {got[0]}, {got[1]}"
            + hint
        )
    if w.shape[-2] % 128 or w.shape[-1] % 128:
        return f"needs multiples of 128 outputs and inputs, not {w.shape[-2]} and {w.shape[-1]}"
    return None


def _packed_refusal(x: QTensor, w: PackedInt4) -> str | None:
    wanted, got = ("e4m3", (1, w.shape[-1])), (x.format, x.block)
    if got != wanted:
        return f"needs (format, block) {wanted} of x where w is packed int4, not {got}"
    if (outputs := math.prod(w.shape[1:-1])) % 128:
        return f"needs a multiple of 128 outputs, not {outputs}"
    return None


def _bf16_refusal(x: jax.Array, w: jax.Array) -> str | None:
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"needs bfloat16 x and w where they are not quantized, not {x.dtype} and {w.dtype}"
    outputs = math.prod(w.shape[1:-1])
    if outputs % 8 or w.shape[-1] % 8:
        return f"needs multiples of 8 outputs and inputs, not {outputs} and {w.shape[-1]}"
    return None


def _supports_mosaic_sm90(*args: Any) -> str | None:
    return no_hopper() or hopper_refusal(*args)


def _auto_mosaic_sm90(x: Any, *_: Any) -> str | None:
    return None if isinstance(x, QTensor) else whole_arrays_only()


def _mosaic_sm90(x: Any, w: Any, group_sizes: jax.Array) -> jax.Array:
    return hopper_kernel(w).grouped_matmul(x, w, group_sizes)


def hopper_kernel(
    w: jax.Array | jax.ShapeDtypeStruct | QTensor | PackedInt4,
) -> ModuleType:
    """The module of the kernel for Hopper that takes such weights."""
    # Not at the top: importing the compiler behind it takes a second or more.
    from pallas_kernels.grouped_matmul import mosaic_sm90_bf16, mosaic_sm90_fp8, mosaic_sm90_w4a8

    if isinstance(w, PackedInt4):
        return mosaic_sm90_w4a8
    return mosaic_sm90_fp8 if isinstance(w, QTensor) else mosaic_sm90_bf16


IMPLEMENTATIONS = (
    Implementation(
        "mosaic_sm90", _mosaic_sm90, auto=_auto_mosaic_sm90, supports=_supports_mosaic_sm90
    ),
    Implementation("xla", xla.grouped_matmul, auto=on_gpu_only),
    Implementation("reference", reference.grouped_matmul),
)


def grouped_matmul(
    x: Float[Array, "M K"] | QTensor,
    w: Float[Array, "E *L K"] | QTensor | PackedInt4,
    group_sizes: Int[Array, " E"],
    *,
    impl: str = "auto",
) -> Float[Array, "M *L"]:
    """Multiplies each group of rows with its own weight: out[r] = w[e] @ x[r] for the group e that
    row r lies in.

    Args:
        x: rows in group order, [M, K]; rows past sum(group_sizes) may hold anything.
        w: an array, QTensor or PackedInt4 [E, ..., N, K].
        group_sizes: i32 [E], rows of each group; 0 is allowed, the sum must not exceed M.
        impl: "auto", "reference", "xla" or "mosaic_sm90" (H100 and H200; e4m3 rows with a scale per
            128 inputs, e4m3 weights with one per 128 x 128; or e4m3 rows with one scale each,
            `FP8_TOKEN`, and packed int4 weights; or bfloat16 rows and weights, which alone have
            gradients, and which "auto" does not take so far; one device or whole copies on each:
            it is not partitioned by itself).

    Returns:
        [M, *w.shape[1:-1]] in the dtype of x, bfloat16 for a QTensor, accumulated in fp32; rows
        past sum(group_sizes) are 0.

    Raises:
        ValueError: the contracted sizes differ.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"grouped_matmul: x has K={x.shape[-1]} but w has K={w.shape[-1]} (shapes {x.shape}, "
            f"{w.shape})"
        )
    run = choose("grouped_matmul", impl, IMPLEMENTATIONS, x, w, group_sizes)
    with jax.named_scope("grouped_matmul"):
        return run(x, w, group_sizes)
