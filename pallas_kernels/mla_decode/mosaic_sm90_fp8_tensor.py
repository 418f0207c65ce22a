"""The "fp8_tensor" cache of the Hopper kernel of `mla_decode`: e4m3 latents and rope keys, one
scale.

Scores are products of e4m3: keys as they come, queries rounded with a scale for each row (token and
head). e4m3 keeps 4 bits, so a query is off by 2.6 % of its length, and a score by 2.6 % of what is
usual for it; FlashMLA's fp8 kernels round queries likewise. Tensor cores multiply fp8 only along
the channels, so values are converted to fp16, which is exact. That may happen long after the scores
have been made and while other columns are multiplied: nobody waits for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import ROWS, accumulator, by_row, multiply_add
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.widen import widen
from pallas_kernels.mla_decode.work import TILE
from pallas_kernels.quant import E4M3_MAX, MIN_AMAX

QUERIES = plgpu.Layout.WGMMA_8BIT
"""How registers hold the left operand of a product of e4m3."""
RAW_SLOTS = 3


class Fp8TensorBlock(Block):
    """Raw tiles come in a ring of `RAW_SLOTS`. A half of the values is a ring too, of groups of
    columns, with room for one more than a tile has: where the products of a group have ended, the
    next tile's next group is converted.

    What is carried in loops: what the next three steps load.
    """

    name = "fp8_tensor"
    dtype = jnp.float16
    prob_slots = 2
    registers = (152, 176)
    copies_queries = False

    @classmethod
    def signals(cls) -> dict[str, int]:
        """See `Block`."""
        return {"raw 0": RAW_SLOTS, "raw 1": RAW_SLOTS, "rope": RAW_SLOTS} | super().signals()

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """See `Block`."""
        e4m3, groups = jnp.float8_e4m3fn, _groups(g)
        ring = [
            hopper.swizzled(groups + 1, TILE, g.half // groups, dtype=t)
            for t in (cls.dtype, jnp.bfloat16)
        ]
        scratch = super().scratch(g) | {
            "raw": [hopper.swizzled(RAW_SLOTS, TILE, g.half, dtype=e4m3)] * 2,
            "rope": hopper.swizzled(RAW_SLOTS, TILE, g.rope, dtype=e4m3),
            "row_factors": plgpu.SMEM((TILE,), jnp.float32),
        }
        if g.interpret:  # there a union counts as used when one of its slots is
            left = [hopper.swizzled(TILE, n, dtype=e4m3) for *_, n in _pieces(g)]
            return scratch | {"rings": [ring, ring], "left": left}
        ring = plgpu.RefUnion(*ring)
        return scratch | {"rings": [ring, ring]}

    def __init__(self, g: Geometry, refs: Any) -> None:
        super().__init__(g, refs)
        self.groups = _groups(g)
        self.value_factor = refs.scales[refs.layer[0]]

    # ------------------------------------------------------------ warpgroup 0

    def take_queries(self, step: jax.Array, order: jax.Array) -> tuple[list[Any], Any]:
        """Rounds the queries to e4m3; they stay in registers, in pieces."""
        g, r = self.g, self.refs
        rows = pl.ds(g.row(-1 - self.load(step), self.part), TILE)
        pools = {"raw 0": (r.q_latent, 0), "raw 1": (r.q_latent, g.half), "rope": (r.q_rope, 0)}
        sources = [
            pools[name][0].at[rows, pl.ds(pools[name][1] + at, columns)]
            for name, at, columns in _pieces(g)
        ]
        largest = plgpu.layout_cast(jnp.full((TILE,), MIN_AMAX, jnp.float32), QUERIES.reduce(1))
        for source in sources:
            largest = jnp.maximum(largest, jnp.abs(_read(source)).max(axis=1))
        r.row_factors[...] = largest * (self.value_factor * (g.exponent / E4M3_MAX))
        plgpu.commit_smem()
        # Read again: there are no registers for them before they are rounded. The compiler keeps
        # them all the same if nothing stands between.
        queries = [self._rounded(i, source, largest) for i, source in enumerate(sources)]
        return queries, plgpu.load(r.row_factors, layout=ROWS)

    def _rounded(self, index: int, source: Any, largest: jax.Array) -> Any:
        rows = _read(source)
        queries = (rows * by_row(E4M3_MAX / largest, rows)).astype(jnp.float8_e4m3fn)
        if not self.g.interpret:
            return queries
        # The interpreter takes both operands of a product from memory only.
        self.refs.left[index][...] = queries
        return self.refs.left[index]

    def scores(self, queries: list[Any], step: jax.Array) -> jax.Array:
        """See `Block`."""
        r, slot = self.refs, lax.rem(step, RAW_SLOTS)
        rings = {"raw 0": r.raw[0], "raw 1": r.raw[1], "rope": r.rope}

        def multiply(scores: Any) -> jax.Array:
            for left, (name, at, columns) in zip(queries, _pieces(self.g), strict=True):
                if at == 0:
                    plgpu.barrier_wait(self.signal(name, slot))
                keys = rings[name].at[slot, :, pl.ds(at, columns)]
                plgpu.wgmma(scores, left, keys.transpose((1, 0)))
            return scores[...]

        return pl.run_scoped(multiply, accumulator(TILE, TILE))

    # ------------------------------------------------------------ warpgroups 1 and 2

    def begin(self, half: int) -> Any:
        """See `Block`."""
        loads = [self.load(step) for step in range(RAW_SLOTS)]
        for step, load in enumerate(loads):
            self._copy_raw(half, load, jnp.int32(step))
        return tuple(loads)

    def begin_item(self, half: int, step: jax.Array, order: jax.Array, carry: Any) -> Any:
        """See `Block`: the first tile is converted while scores are made."""
        carry = self._copy_next(half, step, carry)
        for group in range(self.groups):
            self._convert(half, step + 1, group, carry[0])
        plgpu.commit_smem()
        return carry

    def before_product(self, half: int, step: jax.Array, carry: Any) -> Any:
        """See `Block`."""
        return carry

    def add(
        self, half: int, step: jax.Array, probs: Any, carry: Any, out: list[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        """See `Block`; meanwhile the next tile is converted."""
        carry = self._copy_next(half, step, carry)

        def multiply(*sums: Any) -> None:
            for ref, values in zip(sums, self.values(half, step), strict=True):
                plgpu.wgmma(ref, probs, values)
            for group in range(self.groups):
                if group:
                    plgpu.wgmma_wait(self.groups - group)
                    plgpu.commit_smem()  # all four warps have done their products with the place
                self._convert(half, step + 1, group, carry[0])
            plgpu.wgmma_wait(0)

        out = multiply_add(out, multiply, self.g.interpret is not None)
        plgpu.commit_smem()
        return out, carry

    def values(self, half: int, step: jax.Array) -> list[Any]:
        """See `Block`."""
        return [self._place(half, step, group, 0) for group in range(self.groups)]

    def normed(self, out: jax.Array, norm: jax.Array) -> jax.Array:
        """See `Block`. Queries that are NaN make factors and probabilities NaN, hidden or not; the
        norm of such a row, which sees nothing, is 0.
        """
        return jnp.where(norm > 0, out * norm, 0.0)

    def results(self, half: int, step: jax.Array) -> list[Any]:
        """See `Block`: in the places of the tile."""
        return [self._place(half, step, group, 1) for group in range(self.groups)]

    def _place(self, half: int, step: jax.Array, group: int, view: int) -> Any:
        index = lax.rem(step * self.groups + group, self.groups + 1)
        return self.refs.rings[half][view].at[index]

    def _copy_next(self, half: int, step: jax.Array, carry: Any) -> Any:
        """Loads step + 3 where the raw tile of `step` has been used; returns the next carry."""
        load = self.load(step + RAW_SLOTS)
        self._copy_raw(half, load, step + RAW_SLOTS)
        return *carry[1:], load

    def _copy_raw(self, half: int, load: jax.Array, step: jax.Array) -> None:
        r, slot = self.refs, lax.rem(step, RAW_SLOTS)
        columns = pl.ds(half * self.g.half, self.g.half)

        def copy(page: jax.Array) -> None:
            latent, ready = r.latent_pool.at[page, :, columns], self.signal(f"raw {half}", slot)
            plgpu.copy_gmem_to_smem(latent, r.raw[half].at[slot], ready)
            if half == 0:
                rope, ready = r.rope_pool.at[page], self.signal("rope", slot)
                plgpu.copy_gmem_to_smem(rope, r.rope.at[slot], ready)

        self.copy_page(load, step, copy)

    def _convert(self, half: int, step: jax.Array, group: int, load: jax.Array) -> None:
        """Converts a group of columns of the tile of a step, if it has one."""
        slot, columns = lax.rem(step, RAW_SLOTS), self.g.half // self.groups
        raw, to = self.refs.raw[half].at[slot], self._place(half, step, group, 0)

        @pl.when((load >= 0) & (step < self.num_steps))
        def _() -> None:
            if group == 0:
                plgpu.barrier_wait(self.signal(f"raw {half}", slot))
            widen(raw, to, first=group * columns, interpret=self.g.interpret)


def _groups(g: Geometry) -> int:
    """Groups of columns in half a tile: two if each is then as wide as shared memory is cut."""
    return 2 if g.half % 128 == 0 else 1


def _pieces(g: Geometry) -> list[tuple[str, int, int]]:
    """(ring, first column there, columns) of the products that add up to scores."""
    columns = 128 if g.half % 128 == 0 else 64
    halves = [(f"raw {half}", at, columns) for half in (0, 1) for at in range(0, g.half, columns)]
    return [*halves, ("rope", 0, g.rope)]


def _read(queries: Any) -> jax.Array:
    return plgpu.load(queries, layout=QUERIES, optimized=False).astype(jnp.float32)
