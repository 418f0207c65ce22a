"""The fp8 cache of the Hopper kernel of `mla_decode`: e4m3 latents, a scale per token and 128
channels, bf16 rope keys.

Tensor cores multiply fp8 only with fp8 and only along the channels, so tiles are converted to fp16
in shared memory: e4m3 to fp16 is exact and one instruction for two values, to bf16 it is neither
native nor cheap. fp16 has 11 bits of mantissa, more than the bf16 that `dequantise` would give.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.tile_block import TileBlock
from pallas_kernels.mla_decode.widen import STRIP, widen
from pallas_kernels.mla_decode.work import TILE
from pallas_kernels.quant import E4M3_MAX

RANGE = 64.0
"""Latents are multiplied with this and queries divided by it: fp16 then holds latents of up to 1023
and, to bf16's precision, such of down to 1e-4. Larger ones are clipped.
"""
GROUP = 128
"""Channels with one scale."""
RAW_SLOTS = 2


class Fp8Block(TileBlock):
    """Raw tiles are loaded two steps before they are needed; a warpgroup with values converts its
    half for step + 1 before it multiplies in `step`, while warpgroup 0 makes the probabilities.
    """

    name = "fp8"
    slots = 2
    dtype = jnp.float16
    value_factor = 1 / RANGE

    @classmethod
    def signals(cls) -> dict[str, int]:
        """See `TileBlock`."""
        return super().signals() | {"raw 0": RAW_SLOTS, "raw 1": RAW_SLOTS}

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """See `TileBlock`."""
        ring = [
            hopper.swizzled(cls.slots, TILE, g.half, dtype=t) for t in (cls.dtype, jnp.bfloat16)
        ]
        if not g.interpret:  # there a union counts as used when one of its slots is
            ring = plgpu.RefUnion(*ring)
        raw = hopper.swizzled(RAW_SLOTS, TILE, g.half, dtype=jnp.float8_e4m3fn)
        mine = {"rings": [ring, ring], "raw": [raw, raw]}
        return super().scratch(g) | mine

    def __init__(self, g: Geometry, refs: Any) -> None:
        super().__init__(g, refs)
        self.refs.tiles = [converted for converted, _ in self.refs.rings]

    def staging(self, half: int) -> Any:
        """See `TileBlock`."""
        return self.refs.rings[half][1]

    def as_left(self, queries: jax.Array) -> jax.Array:
        """See `TileBlock`."""
        return (queries.astype(jnp.float32) * (1 / RANGE)).astype(jnp.float16)

    def fill(self, half: int) -> tuple[jax.Array, ...]:
        """See `TileBlock`."""
        self.copy_queries(half, self.load(0), jnp.int32(0))
        self._copy_raw(half, self.load(1), jnp.int32(1))
        self._copy_raw(half, self.load(2), jnp.int32(2))
        return self.load(2), self.load(1), self.load(3), *self._scales(half, self.load(1))

    def refill(
        self, half: int, step: jax.Array, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """See `TileBlock`. Carries what step + 2, + 1 and + 3 load, and the scales of + 1."""
        second, first, third, *scales = carry
        later = self._scales(half, second)  # now, because they come from memory
        plgpu.commit_smem()  # all four warps have done their products with the slot
        self.copy_queries(half, first, step + 1)
        pl.when((first >= 0) & (step + 1 < self.num_steps))(
            lambda: self._convert(half, step + 1, scales)
        )
        self._copy_raw(half, third, step + 3)
        return third, second, self.load(step + 4), *later

    def _copy_raw(self, half: int, load: jax.Array, step: jax.Array) -> None:
        r, slot = self.refs, lax.rem(step, RAW_SLOTS)
        rows = r.latent_pool.at[:, :, pl.ds(half * self.g.half, self.g.half)]
        to, ready = r.raw[half].at[slot], self.signal(f"raw {half}", slot)
        self.copy_page(load, step, lambda page: plgpu.copy_gmem_to_smem(rows.at[page], to, ready))

    def _scales(self, half: int, load: jax.Array) -> list[jax.Array]:
        """Scales of this half's groups of channels for each row of a page, fp32 [64]."""
        page = self.first_page + jnp.maximum(load, 0)
        groups = range(half * self.g.half // GROUP, -(-(half + 1) * self.g.half // GROUP))
        return [
            plgpu.load(self.refs.scale_pool.at[page, :, group], layout=ROWS, optimized=False)
            for group in groups
        ]

    def _convert(self, half: int, step: jax.Array, scales: list[jax.Array]) -> None:
        r, slot, raw_slot = self.refs, lax.rem(step, self.slots), lax.rem(step, RAW_SLOTS)
        first = half * self.g.half
        plgpu.barrier_wait(self.signal(f"raw {half}", raw_slot))
        groups = [(first + at) // GROUP - first // GROUP for at in range(0, self.g.half, STRIP)]
        factors = [jnp.minimum(scales[group] * RANGE, 65504 / E4M3_MAX) for group in groups]
        raw, to = r.raw[half].at[raw_slot], r.tiles[half].at[slot]
        widen(raw, to, factors=factors, interpret=self.g.interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.signal(f"tile {half}", slot))
