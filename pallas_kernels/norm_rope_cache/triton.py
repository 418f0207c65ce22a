"""`norm_rope_cache` as one kernel in Triton: a program has a row, and writes it into the pool. The
pool is not copied: its arrays are operands and results in one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.quant import E4M3_MAX, FP8_TILE
from pallas_kernels.triton_ops import compiler_params, divide
from pallas_kernels.triton_quant import quantise_tiles

TILE = 128
"""Channels of a tile: of the latent that share a scale."""
WARPS = 4


def norm_rope_cache(
    q: Float[Array, "T Q"] | None,
    q_weight: Float[Array, " Q"] | None,
    kv: Float[Array, "T K"],
    kv_weight: Float[Array, " C"],
    tables: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    pages: Int[Array, " T"],
    slots: Int[Array, " T"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[jax.Array | None, LatentCache]:
    """See `api.norm_rope_cache`.

    Args:
        interpret: run on a CPU.
    """
    # The scales of "fp8_tensor" are only read.
    written, read = {"fp8": (("scale",), ()), "fp8_tensor": ((), ("scale",))}.get(
        cache.format, ((), ())
    )
    pool: dict[str, Any] = {n: getattr(cache, n) for n in ("latent", "rope", *written)}
    queries = {} if q is None else {"q": q, "q_weight": q_weight}
    operands = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "pages": pages,
        "slots": slots,
        "kv": kv,
        "kv_weight": kv_weight,
        "cos": tables[0],
        "sin": tables[1],
        **queries,
        **{name: getattr(cache, name) for name in read},
    }
    outs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in pool.items()}
    if q is not None:
        outs["normed"] = jax.ShapeDtypeStruct(q.shape, q.dtype)
    names = (*operands, *(f"{name}_before" for name in pool), *outs)

    def kernel(*refs: Any) -> None:
        _kernel(dict(zip(names, refs, strict=True)), cache.format, eps, interpret)

    results = pl.pallas_call(
        kernel,
        out_shape=tuple(outs.values()),
        input_output_aliases={len(operands) + i: i for i in range(len(pool))},
        grid=(kv.shape[0],),
        compiler_params=compiler_params(WARPS),
        interpret=interpret,
        name="norm_rope_cache",
    )(*operands.values(), *pool.values())
    made = dict(zip(outs, results, strict=True))
    return made.pop("normed", None), dataclasses.replace(cache, **made)


def _kernel(refs: dict[str, Any], form: str, eps: float, interpret: bool) -> None:
    row = pl.program_id(0)
    if "q" in refs:
        normed, channel, real = _normed(refs["q"], refs["q_weight"], row, eps)
        plt.store(refs["normed"].at[row, channel], normed, mask=real)

    _, pages, page_size, _ = refs["latent"].shape
    layer, page, slot = refs["layer"][0], refs["pages"][row], refs["slots"][row]
    is_there = (0 <= page) & (page < pages) & (0 <= slot) & (slot < page_size)
    where = layer, page, slot
    latent, channel, real = _normed(refs["kv"], refs["kv_weight"], row, eps)
    rope, key_channel, key_real = _rotated(refs, row)
    if form == "fp8":
        latent, scales = quantise_tiles(latent.astype(jnp.float32), FP8_TILE, interpret)
        tile = jnp.arange(scales.shape[0])
        is_tile = (tile < refs["scale"].shape[3]) & is_there
        plt.store(refs["scale"].at[*where, tile], scales, mask=is_tile)
    elif form == "fp8_tensor":
        scale = refs["scale"][layer]
        latent, rope = (_to_e4m3(x, scale, interpret) for x in (latent, rope))
    plt.store(refs["latent"].at[*where, channel], latent, mask=real & is_there)
    plt.store(refs["rope"].at[*where, key_channel], rope, mask=key_real & is_there)


def _normed(
    x_ref: Any, weight_ref: Any, row: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Values, channels, whether there is such a channel) of a row's first channels, as many as
    there are weights: [tiles, 128] each, values in the dtype of x, 0 past the channels.
    """
    width = weight_ref.shape[0]
    tiles = pl.next_power_of_2(-(-width // TILE))
    channel = jnp.arange(tiles)[:, None] * TILE + jnp.arange(TILE)[None]
    real = channel < width
    x = plt.load(x_ref.at[row, channel], mask=real, other=0.0).astype(jnp.float32)
    weight = plt.load(weight_ref.at[channel], mask=real, other=0.0).astype(jnp.float32)
    mean = jnp.sum(jnp.sum(x * x, axis=1), axis=0) * (1 / width)
    normed = (x * lax.rsqrt(mean + eps)).astype(x_ref.dtype).astype(jnp.float32)
    return (weight * normed).astype(x_ref.dtype), channel, real


def _rotated(refs: dict[str, Any], row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same of its rope key, [2, half]."""
    kv_ref, first = refs["kv"], refs["kv_weight"].shape[0]
    half = refs["cos"].shape[1]
    pair = jnp.arange(pl.next_power_of_2(half))
    real = pair < half
    cos, sin = (plt.load(refs[name].at[row, pair], mask=real, other=0.0) for name in ("cos", "sin"))
    a, b = (
        plt.load(kv_ref.at[row, first + pair + offset], mask=real, other=0.0).astype(jnp.float32)
        for offset in (0, half)
    )
    is_second = jnp.arange(2)[:, None] == 1
    rotated = jnp.where(is_second, (b * cos + a * sin)[None], (a * cos - b * sin)[None])
    channel = jnp.arange(2)[:, None] * half + pair[None]
    return rotated.astype(kv_ref.dtype), channel, jnp.broadcast_to(real[None], channel.shape)


def _to_e4m3(x: jax.Array, scale: jax.Array, interpret: bool) -> jax.Array:
    scaled = divide(x.astype(jnp.float32), jnp.broadcast_to(scale, x.shape), interpret)
    return jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
