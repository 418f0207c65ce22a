"""Sizes of a call of the Hopper kernels of `mla_decode`."""

import dataclasses
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_decode.tiles import Tiles
from pallas_kernels.mla_decode.work import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is known when the kernel is compiled.

    Attributes:
        heads: query heads.
        queries: query tokens a group.
        latent: C.
        rope: P.
        pages: pages of the pool in a layer.
        scale: softmax scale.
        tiles: see there.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.
        timeline: see `hopper.compiler_params`.
    """

    heads: int
    queries: int
    latent: int
    rope: int
    pages: int
    scale: float
    tiles: Tiles
    interpret: Any = None
    timeline: str | None = None

    @property
    def rows(self) -> int:
        """Query rows a group: tokens x heads."""
        return self.queries * self.heads

    @property
    def parts(self) -> int:
        """Thread blocks a worker."""
        return -(-self.rows // TILE)

    @property
    def part_tokens(self) -> int:
        """Tokens that a thread block holds rows of."""
        return max(TILE // self.heads, 1)

    @property
    def half(self) -> int:
        """Latent columns of a warpgroup that multiplies with values."""
        return self.latent // 2

    @property
    def exponent(self) -> float:
        """From scores to exponents of 2."""
        return self.scale * math.log2(math.e)

    def row(self, group: jax.Array, part: jax.Array) -> jax.Array:
        """First query row of a thread block."""
        return pl.multiple_of(group * self.rows + part * TILE, 8)

    def store(self, staged: Any, out: Any, group: jax.Array, part: jax.Array) -> None:
        """Starts to copy the rows of a tile that belong to the group; `out` has all query rows."""
        row = self.row(group, part)
        if self.rows % TILE == 0:
            plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(row, TILE)])
            return
        for token in range(self.part_tokens):

            @pl.when(part * self.part_tokens + token < self.queries)
            def _(first: int = token * self.heads) -> None:
                rows = pl.ds(pl.multiple_of(row + first, 8), self.heads)
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(first, self.heads)], out.at[rows])
