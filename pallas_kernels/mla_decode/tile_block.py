"""Blocks that multiply tiles of 16 bits: a tile is both keys and values.

Each load fills a slot of a ring of tiles [64, C] and one rope tile [64, P]; queries are the first
tile of an item. Warpgroups 1 and 2 are the last to use a tile, so whoever has used its half loads
the next one there. That queries are in registers and that no warpgroup only loads makes room for
three tiles of bf16, enough to hide the latency of memory. FlashMLA (deepseek-ai/FlashMLA, dense
decode for sm90) lets the warpgroups that multiply load as well, with another division of labour.
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import MATRIX, accumulator, multiply_add, swizzled
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.work import TILE

ASIDE = 64
"""Latent columns of the queries, the last ones, that stay in shared memory: what the registers of
warpgroup 0 do not hold. All three warpgroups have 504 registers a thread between them.
"""


class TileBlock(Block):
    """What is carried in loops: the rope tile of step + 2, and what `refill` carries."""

    slots: ClassVar[int]
    """Tiles of the ring."""

    @classmethod
    def signals(cls) -> dict[str, int]:
        """See `Block`."""
        mine = {"tile 0": cls.slots, "tile 1": cls.slots}
        mine |= {"rope": 1, "rope free": 1, "queries taken": 2}
        return mine | super().signals()

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """See `Block`; subclasses add `tiles`, the ring of each half."""
        scratch = super().scratch(g) | {
            "rope": swizzled(TILE, g.rope, dtype=jnp.bfloat16),
            "rope_queries": swizzled(TILE, g.rope, dtype=jnp.bfloat16),
            "last_queries": swizzled(TILE, ASIDE, dtype=cls.dtype),
        }
        if g.interpret:
            columns = (g.half, max(g.half - ASIDE, ASIDE))
            scratch["left"] = [swizzled(TILE, n, dtype=cls.dtype) for n in columns]
        return scratch

    # ------------------------------------------------------------ how tiles reach shared memory

    @abc.abstractmethod
    def fill(self, half: int) -> tuple[jax.Array, ...]:
        """Loads before the first step; returns what `refill` carries."""

    @abc.abstractmethod
    def refill(
        self, half: int, step: jax.Array, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """At the beginning of `step`: loads into what the step before has left. `carry[0]` is what
        step + 2 loads.
        """

    @abc.abstractmethod
    def staging(self, half: int) -> Any:
        """The ring of a half as bf16: where queries arrive and results leave."""

    def as_left(self, queries: jax.Array) -> jax.Array:
        """Queries as the left operand of a product with `tiles`."""
        return queries

    def copy_queries(self, half: int, load: jax.Array, step: jax.Array) -> None:
        """Starts to load half of the queries into the ring, if that is what the step loads."""
        r, slot = self.refs, lax.rem(step, self.slots)
        columns = pl.ds(half * self.g.half, self.g.half)

        @pl.when((load < 0) & (step < self.num_steps))
        def _() -> None:
            rows = r.q_latent.at[pl.ds(self.g.row(-1 - load, self.part), TILE), columns]
            plgpu.copy_gmem_to_smem(
                rows, self.staging(half).at[slot], self.signal(f"tile {half}", slot)
            )

    def copy_rope(self, load: jax.Array, step: jax.Array) -> None:
        """Starts to load a rope tile."""
        r, ready = self.refs, self.signal("rope")

        @pl.when((load < 0) & (step < self.num_steps))
        def _() -> None:
            rows = r.q_rope.at[pl.ds(self.g.row(-1 - load, self.part), TILE)]
            plgpu.copy_gmem_to_smem(rows, r.rope, ready)

        self.copy_page(
            load, step, lambda page: plgpu.copy_gmem_to_smem(r.rope_pool.at[page], r.rope, ready)
        )

    def next_rope(self, load: jax.Array, step: jax.Array) -> None:
        """Waits until the rope tile of the step before has been used; loads the one of `step`."""
        pl.when(step - 1 < self.num_steps)(lambda: plgpu.barrier_wait(self.signal("rope free")))
        self.copy_rope(load, step)

    # ------------------------------------------------------------ queries and keys

    def take_queries(self, step: jax.Array, order: jax.Array) -> tuple[list[Any], Any]:
        """Moves the queries out of the ring: [64, C / 2] and [64, C / 2 - ASIDE] into registers."""
        r, slot, columns = self.refs, lax.rem(step, self.slots), self.g.half - ASIDE
        plgpu.barrier_wait(self.signal("rope"))
        r.rope_queries[...] = r.rope[...]
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.signal("rope free"))
        for half in range(2):
            plgpu.barrier_wait(self.signal(f"tile {half}", slot))
        queries = [self._left(0, slot, self.g.half)]
        if columns:
            queries.append(self._left(1, slot, columns))
        last = plgpu.load(self.staging(1).at[slot, :, pl.ds(columns, ASIDE)], layout=MATRIX)
        r.last_queries[...] = self.as_left(last)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.signal("queries taken", lax.rem(order, 2)))
        return queries, self.g.exponent

    def _left(self, half: int, slot: jax.Array, columns: int) -> Any:
        rows = self.staging(half).at[slot, :, pl.ds(0, columns)]
        queries = self.as_left(plgpu.load(rows, layout=MATRIX))
        if not self.g.interpret:
            return queries
        # The interpreter takes both operands of a product from memory only.
        self.refs.left[half][...] = queries
        return self.refs.left[half]

    def scores(self, queries: list[Any], step: jax.Array) -> jax.Array:
        """See `Block`."""
        r, slot, columns = self.refs, lax.rem(step, self.slots), self.g.half - ASIDE

        def multiply(scores: Any) -> jax.Array:
            # The rope tile first: there is one, and the next load needs all the time it can get.
            plgpu.barrier_wait(self.signal("rope"))
            plgpu.wgmma(scores, r.rope_queries, r.rope.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.signal("rope free"))
            for half, left in enumerate(queries):
                plgpu.barrier_wait(self.signal(f"tile {half}", slot))
                keys = r.tiles[half].at[slot, :, pl.ds(0, left.shape[1])]
                plgpu.wgmma(scores, left, keys.transpose((1, 0)))
            if not columns:
                plgpu.barrier_wait(self.signal("tile 1", slot))
            keys = r.tiles[1].at[slot, :, pl.ds(columns, ASIDE)]
            plgpu.wgmma(scores, r.last_queries, keys.transpose((1, 0)))
            return scores[...]

        return pl.run_scoped(multiply, accumulator(TILE, TILE))

    # ------------------------------------------------------------ values

    def begin(self, half: int) -> Any:
        """See `Block`."""
        carry = self.fill(half)
        if half == 0:
            self.copy_rope(self.load(0), jnp.int32(0))
            self.next_rope(self.load(1), jnp.int32(1))
        return carry[0], carry

    def begin_item(self, half: int, step: jax.Array, order: jax.Array, carry: Any) -> Any:
        """See `Block`."""
        rope_load, carry = self.before_product(half, step, carry)
        plgpu.barrier_wait(self.signal("queries taken", lax.rem(order, 2)))
        if half == 0:
            self.next_rope(rope_load, step + 2)
        return rope_load, carry

    def before_product(self, half: int, step: jax.Array, carry: Any) -> Any:
        """See `Block`."""
        _, inner = carry
        return inner[0], self.refill(half, step, inner)

    def add(
        self, half: int, step: jax.Array, probs: Any, carry: Any, out: list[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        """See `Block`; meanwhile the rope tile of step + 2 is asked for."""
        rope_load, _ = carry

        def multiply(*sums: Any) -> None:
            for ref, values in zip(sums, self.values(half, step), strict=True):
                plgpu.wgmma(ref, probs, values)
            if half == 0:
                self.next_rope(rope_load, step + 2)
            plgpu.wgmma_wait(0)

        return multiply_add(out, multiply, self.g.interpret is not None), carry

    def values(self, half: int, step: jax.Array) -> list[Any]:
        """See `Block`."""
        tile = self.refs.tiles[half].at[lax.rem(step, self.slots)]
        columns = min(self.g.tiles.value_columns, self.g.half)
        return [tile.at[:, pl.ds(at, columns)] for at in range(0, self.g.half, columns)]

    def results(self, half: int, step: jax.Array) -> list[Any]:
        """See `Block`: in the slot of the tile."""
        return [self.staging(half).at[lax.rem(step, self.slots)]]
