"""Contract of `permute` and `combine`: rows on their way to the experts they chose, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.act_quant.api import LONGEST_ROW
from pallas_kernels.moe_permute import reference
from pallas_kernels.quant import FP8_TILE, QTensor, Recipe
from pallas_kernels.select import Implementation, choose, no_ada, too_large, whole_arrays_only

MOST_CHOICES = 32
"""The kernels write out a step for each."""


def permute_refusal(
    x: jax.Array, places: jax.Array, *_: Any, rows: int, recipe: Recipe
) -> str | None:
    """Why the kernel of `permute` cannot take these arguments (on such a device), or None."""
    if recipe.block not in ((1, 128), (1, 0)) or recipe.floor < 1e-30:
        return (
            f"needs a scale per 1x128 or per row and a floor, not {recipe.block} and {recipe.floor}"
        )
    if not recipe.block[1] and x.shape[1] > LONGEST_ROW:
        return f"needs rows of at most {LONGEST_ROW} for a scale per row, not {x.shape[1]}"
    return too_large(x.shape, (rows, x.shape[1])) or _shape_refusal(places, x.shape[1])


def combine_refusal(y: jax.Array, places: jax.Array, *_: Any) -> str | None:
    """Why the kernel of `combine` cannot take these arguments (on such a device), or None."""
    return too_large(y.shape, (places.shape[0], y.shape[1])) or _shape_refusal(places, y.shape[1])


def _shape_refusal(places: jax.Array, columns: int) -> str | None:
    tokens, choices = places.shape
    if not (tokens and columns and 1 <= choices <= MOST_CHOICES):
        return (
            f"needs rows, channels and 1 to {MOST_CHOICES} choices a row, not {tokens}, "
            f"{columns} and {choices}"
        )
    return None


def _permute(*args: Any, **kwargs: Any) -> QTensor:
    # Not at the top: importing Pallas takes a second or more.
    from pallas_kernels.moe_permute import triton

    return triton.permute(*args, **kwargs)


def _combine(*args: Any) -> jax.Array:
    from pallas_kernels.moe_permute import triton

    return triton.combine(*args)


PERMUTE = (
    Implementation(
        "triton",
        _permute,
        auto=whole_arrays_only,
        supports=lambda *args, **kwargs: no_ada() or permute_refusal(*args, **kwargs),
    ),
    # One implementation under two names: the fp32 reference is already what XLA should run.
    Implementation("reference", reference.permute),
    Implementation("xla", reference.permute),
)
COMBINE = (
    Implementation(
        "triton",
        _combine,
        auto=whole_arrays_only,
        supports=lambda *args: no_ada() or combine_refusal(*args),
    ),
    Implementation("reference", reference.combine),
    Implementation("xla", reference.combine),
)


def permute(
    x: Float[Array, "T D"],
    places: Int[Array, "T K"],
    channel_scale: Float[Array, " D"] | None = None,
    *,
    rows: int,
    recipe: Recipe = FP8_TILE,
    impl: str = "auto",
) -> QTensor:
    """Quantizes x * channel_scale and copies row t to the rows places[t] of the result.

    A row is read and quantized once, however many experts it goes to. Source: DeepSeek-V3 report,
    section 3.3.2 (1x128 tiles).

    Args:
        x: tokens, any float dtype.
        places: where each token's copies go, no row twice; outside of 0 to `rows` - 1: nowhere.
        channel_scale: factor of each channel, or None.
        rows: M, of the result.
        recipe: as for `act_quant`.
        impl: "auto", "reference", "xla" or "triton" (NVIDIA GPUs from compute capability 8.9 on;
            a scale per 1x128 or per row; one device or whole copies on each: it is not partitioned
            by itself).

    Returns:
        QTensor [M, D] of float8_e4m3fn. Rows that no place names hold anything, NaN included.

    Raises:
        ValueError: the recipe is not an e4m3 one.
    """
    if recipe.format != "e4m3":
        raise ValueError(f"permute makes e4m3, not {recipe.format!r}; use FP8_TILE")
    args, options = (x, places, channel_scale), {"rows": rows, "recipe": recipe}
    run = choose("permute", impl, PERMUTE, *args, **options)
    with jax.named_scope("moe_permute"):
        return run(*args, **options)


def combine(
    y: Float[Array, "M D"],
    places: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    impl: str = "auto",
) -> Float[Array, "T D"]:
    """Sums weights[t, k] * y[places[t, k]] over k, in fp32 and in this order.

    Args:
        y: what the experts made of the rows of `permute`.
        places: as there. A place outside of y counts as 0, whatever its weight.
        weights: float32 router weights.
        impl: as in `permute`.

    Returns:
        [T, D] in the dtype of y.
    """
    args = (y, places, weights.astype(jnp.float32))
    run = choose("combine", impl, COMBINE, *args)
    with jax.named_scope("moe_combine"):
        return run(*args)
