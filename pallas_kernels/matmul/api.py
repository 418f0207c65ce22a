"""Contract of `matmul`: x @ w.T with w stored [..., N, K] as in checkpoints."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.matmul import xla
from pallas_kernels.quant import FP8_BLOCK, QTensor, Weight, dequantise
from pallas_kernels.select import (
    Implementation,
    choose,
    no_hopper,
    on_gpu_only,
    too_large,
    whole_arrays_only,
)


def _reference(x: jax.Array, w: Weight) -> jax.Array:
    out = xla.contract(x.astype(jnp.float32), dequantise(w), precision="highest")
    return out.astype(x.dtype)


def hopper_refusal(x: jax.Array, w: Weight) -> str | None:
    """Why the kernel for Hopper cannot take these arguments (on such a device), or None."""
    wanted = (FP8_BLOCK.format, FP8_BLOCK.block)
    if not isinstance(w, QTensor):
        return f"needs w with (format, block) {wanted}, not an array"
    if (w.format, w.block) != wanted:
        return f"needs w with (format, block) {wanted}, not {(w.format, w.block)}"
    if x.dtype != jnp.bfloat16 or w.scales.dtype != jnp.float32:
        return f"needs bfloat16 x and float32 scales, not {x.dtype} and {w.scales.dtype}"
    *lead, outputs, inputs = w.shape
    unit = 64 if math.prod(lead) == 1 else 128  # blocks of scales begin anew in each matrix
    if outputs % unit or outputs < 128 or inputs % 128:
        return (
            f"needs a multiple of {unit} outputs, at least 128, and of 128 inputs, not {outputs} "
            f"and {inputs}"
        )
    if not x.size:
        return f"needs rows, not x of {x.shape}"
    return too_large(x.shape)


def _supports_mosaic_sm90(x: jax.Array, w: Weight) -> str | None:
    return no_hopper() or hopper_refusal(x, w)


def _mosaic_sm90(x: jax.Array, w: QTensor) -> jax.Array:
    # Not at the top: importing the compiler behind it takes a second or more.
    from pallas_kernels.matmul import mosaic_sm90

    return mosaic_sm90.matmul(x, w)


IMPLEMENTATIONS = (
    Implementation(
        "mosaic_sm90", _mosaic_sm90, auto=whole_arrays_only, supports=_supports_mosaic_sm90
    ),
    Implementation("xla", xla.matmul, auto=on_gpu_only),
    Implementation("reference", _reference),
)


def matmul(
    x: Float[Array, "*T K"], w: Float[Array, "*L K"] | QTensor, *, impl: str = "auto"
) -> Float[Array, "..."]:
    """Product over the last axis of both: out[..., l] = sum_k x[..., k] w[l, k].

    Args:
        x: activations [..., K].
        w: an array or QTensor [..., N, K]; leading axes (the gate/up pair of an MLP, say) appear in
            the output in order. A QTensor is dequantized block by block: fp32 in `reference`,
            rounded to x's dtype in `xla`. `mosaic_sm90` multiplies e4m3 weights as they are, and
            rounds x to e4m3 with a scale per row and 128 inputs: the recipe of every checkpoint
            with such weights that the loader reads (`activation_scheme` "dynamic").
        impl: "auto", "reference", "xla" or "mosaic_sm90" (H100 and H200; bfloat16 x; e4m3 weights
            with a scale per 128 x 128; one device or whole copies on each: it is not partitioned by
            itself).

    Returns:
        [..., *w.shape[:-1]] in the dtype of x, accumulated in fp32.

    Raises:
        ValueError: the contracted sizes differ.
        NotImplementedError: the named implementation cannot run here; or a gradient with respect to
            quantized weights is asked of "mosaic_sm90".
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"matmul: x has K={x.shape[-1]} but w has K={w.shape[-1]} (shapes {x.shape} and "
            f"{w.shape})"
        )
    run = choose("matmul", impl, IMPLEMENTATIONS, x, w)
    with jax.named_scope("matmul"):
        return run(x, w)
