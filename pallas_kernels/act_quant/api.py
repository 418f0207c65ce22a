"""Contract of `act_quant`: activations to e4m3 with a scale per tile, token or tensor."""

import jax
from jaxtyping import Array, Float

from pallas_kernels.quant import FP8_TILE, QTensor, Recipe, quantise
from pallas_kernels.select import Implementation, choose

IMPLEMENTATIONS = (
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
        impl: "auto", "reference" or "xla".

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
