"""`permute` and `combine` in Triton: a program has some channels of one token, all copies of them.

So `permute` reads and quantizes what it copies once, and `combine` sums in registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.quant import QTensor, Recipe
from pallas_kernels.triton_ops import compiler_params
from pallas_kernels.triton_quant import quantise_tiles

CHANNELS = 1024
"""Of a program, at most; one tile if that is longer."""
PER_THREAD = 8
"""Channels of a thread: 16 bytes of bf16."""


def permute(
    x: Float[Array, "T D"],
    places: Int[Array, "T K"],
    channel_scale: Float[Array, " D"] | None,
    *,
    rows: int,
    recipe: Recipe,
    channels: int = CHANNELS,
    per_thread: int = PER_THREAD,
    interpret: bool = False,
) -> QTensor:
    """See `api.permute`.

    Args:
        channels: of a program; a power of two of at least 128.
        per_thread: channels of a thread.
        interpret: run on a CPU.
    """
    tokens, width = x.shape
    tile = recipe.block[1] or width
    tiles, step = -(-width // tile), pl.next_power_of_2(tile)
    at_once = min(max(channels // step, 1), pl.next_power_of_2(tiles))
    kernel = functools.partial(
        _permute_kernel,
        rows=rows,
        size=tile,
        step=step,
        at_once=at_once,
        recipe=recipe,
        interpret=interpret,
    )
    values, scales = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((rows, width), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows, tiles), jnp.float32),
        ],
        grid=(tokens, -(-tiles // at_once)),
        compiler_params=compiler_params(_warps(at_once * step, per_thread)),
        interpret=interpret,
        name="moe_permute",
    )(x, places, *(() if channel_scale is None else (channel_scale,)))
    return QTensor(values, scales, (1, tile), "e4m3")


def _permute_kernel(
    x_ref: Any,
    places_ref: Any,
    *refs: Any,
    rows: int,
    size: int,
    step: int,
    at_once: int,
    recipe: Recipe,
    interpret: bool,
) -> None:
    *channel_scale_ref, values_ref, scales_ref = refs
    token, width = pl.program_id(0), x_ref.shape[1]
    tile = pl.program_id(1) * at_once + jnp.arange(at_once)
    within = jnp.arange(step)[None]
    channel = tile[:, None] * size + within
    is_real = (channel < width) & (within < size)
    x = plt.load(x_ref.at[token, channel], mask=is_real, other=0.0).astype(jnp.float32)
    for ref in channel_scale_ref:
        x *= plt.load(ref.at[channel], mask=is_real, other=0.0).astype(jnp.float32)
    values, scales = quantise_tiles(x, recipe, interpret)
    for k in range(places_ref.shape[1]):
        place = places_ref[token, k]
        is_there = (0 <= place) & (place < rows)
        plt.store(values_ref.at[place, channel], values, mask=is_real & is_there)
        is_tile = (tile < scales_ref.shape[1]) & is_there
        plt.store(scales_ref.at[place, tile], scales, mask=is_tile)


def combine(
    y: Float[Array, "M D"],
    places: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    channels: int = CHANNELS,
    per_thread: int = PER_THREAD,
    interpret: bool = False,
) -> jax.Array:
    """See `api.combine`.

    Args:
        channels: of a program; a power of two.
        per_thread: channels of a thread.
        interpret: run on a CPU.
    """
    tokens, width = places.shape[0], y.shape[1]
    channels = min(channels, pl.next_power_of_2(width))
    return pl.pallas_call(
        functools.partial(_combine_kernel, channels=channels),
        out_shape=jax.ShapeDtypeStruct((tokens, width), y.dtype),
        grid=(tokens, -(-width // channels)),
        compiler_params=compiler_params(_warps(channels, per_thread)),
        interpret=interpret,
        name="moe_combine",
    )(y, places, weights)


def _combine_kernel(
    y_ref: Any, places_ref: Any, weights_ref: Any, out_ref: Any, *, channels: int
) -> None:
    token, (rows, width) = pl.program_id(0), y_ref.shape
    channel = pl.program_id(1) * channels + jnp.arange(channels)
    total = jnp.zeros(channels, jnp.float32)
    for k in range(places_ref.shape[1]):
        place = places_ref[token, k]
        is_there = (0 <= place) & (place < rows)
        mask = (channel < width) & is_there
        row = plt.load(y_ref.at[place, channel], mask=mask, other=0.0).astype(jnp.float32)
        total += jnp.where(is_there, row * weights_ref[token, k], 0.0)
    plt.store(out_ref.at[token, channel], total.astype(out_ref.dtype), mask=channel < width)


def _warps(channels: int, per_thread: int) -> int:
    return min(max(channels // per_thread // 32, 1), 16)
