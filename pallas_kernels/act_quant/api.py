"""Contract of `act_quant`: activations to e4m3 with a scale per tile, token or tensor."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.quant import FP8_TILE, QTensor, Recipe, quantise
from pallas_kernels.select import Implementation, choose, no_ada, too_large, whole_arrays_only

LONGEST_ROW = 16384
"""A scale per token needs the row in the registers of a thread block."""


def triton_refusal(x: jax.Array, recipe: Recipe) -> str | None:
    """Why the kernel in Triton cannot take these arguments (on such a device), or None."""
    if recipe.block not in ((1, 128), (1, 0)):
        return f"needs a scale per 1x128 or per token, not per {recipe.block}"
    if recipe.floor < 1e-30:
        return f"needs a floor that keeps scales normal, not {recipe.floor}"
    if recipe.block[1] == 0 and x.shape[-1] > LONGEST_ROW:
        return f"needs rows of at most {LONGEST_ROW} for a scale per token, not {x.shape[-1]}"
    return too_large(x.shape) if x.size else "needs at least one row"


def _supports_triton(*args: Any) -> str | None:
    return no_ada() or triton_refusal(*args)


def _triton(*args: Any) -> QTensor:
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.act_quant import triton

    return triton.act_quant(*args)


IMPLEMENTATIONS = (
    Implementation("triton", _triton, auto=whole_arrays_only, supports=_supports_triton),
    # One implementation under two names: the fp32 reference is already what XLA should run.
    Implementation("reference", quantise),
    Implementation("xla", quantise),
)


def act_quant(
    x: Float[Array, "*B T K"], recipe: Recipe = FP8_TILE, *, impl: str = "auto"
) -> QTensor:
    """Quantizes activations dynamically: scale = max(amax, 1e-4) / 448 per block of the recipe,
    values clipped to +-448.

    Source: DeepSeek-V3 report, section 3.3.2 (1x128 tiles).

    Args:
        x: [..., T, K], any float dtype.
        recipe: `FP8_TILE` (1x128), `FP8_TILE_UE8M0` (scales rounded up to powers of two),
            `FP8_TOKEN` or `FP8_TENSOR`.
        impl: "auto", "reference", "xla" or "triton" (NVIDIA GPUs from compute capability 8.9 on; a
            scale per tile or token; divisions are rounded to nearest, XLA's on a GPU are not; one
            device or whole copies on each: it is not partitioned by itself).

    Returns:
        QTensor with float8_e4m3fn values [..., T, K] and float32 scales.

    Raises:
        ValueError: the recipe is not an e4m3 one.
    """
    if recipe.format != "e4m3":
        raise ValueError(
            f"act_quant makes e4m3, not {recipe.format!r}; use FP8_TILE, FP8_TOKEN or FP8_TENSOR"
        )
    run = choose("act_quant", impl, IMPLEMENTATIONS, x, recipe)
    with jax.named_scope("act_quant"):
        return run(x, recipe)
