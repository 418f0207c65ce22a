"""A thread block of the Hopper kernels of `mla_decode`: its memory, and how tiles get there.

A worker (see `work.py`) has a thread block for every 64 query rows of a group. For each item it
loads the queries and then, page by page, the cached rows into a ring of tiles [64, C] and into one
rope tile [64, P]: the queries are the first tile of an item. A load is a step; steps are counted
through all items of a worker, so the first loads of an item overlap with the end of the one before.

    warpgroup 0       scores S = Q K^T and their softmax (`scores.py`); the queries stay in its
                      registers
    warpgroups 1, 2   O = alpha O + P V, half of the latent columns each (`values.py`); a tile is
                      both keys and values, so they are the last to use it, and whoever has used its
                      half loads the next tile there

That queries are in registers and that no warpgroup only loads makes room for three tiles of bf16,
enough to hide the latency of memory. FlashMLA (deepseek-ai/FlashMLA, dense decode for sm90) lets
the warpgroups that multiply load as well, with another division of labour.
"""

import abc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import swizzled
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.work import TILE

ASIDE = 64
"""Latent columns of the queries, the last ones, that stay in shared memory: what the registers of
warpgroup 0 do not hold. All three warpgroups have 504 registers a thread between them.
"""


class Block(abc.ABC):
    """What a warpgroup works with; subclasses are the formats of the cache.

    Attributes of `refs`, in memory: q_latent [T H, C], q_rope [T H, P], the pools latent_pool and
    rope_pool with layers and pages in one axis, layer [1], visible [T], workers, items, steps;
    results out [T H, C], lse [G, parts, 64], and for partial results out_parts and lse_parts with
    the number of the partial in front. The rest is shared memory, see `scratch`.
    """

    name: str
    """Of the format."""
    slots: int
    """Tiles of the ring."""
    dtype: Any
    """What is multiplied, rope parts aside."""
    value_scale = 1.0
    """What values in shared memory are multiplied with."""

    @classmethod
    def signals(cls) -> dict[str, int]:
        """What one warpgroup or load tells others, with how many barriers. All of them are one
        array: each array costs every thread a register.
        """
        return {
            "tile 0": cls.slots,
            "tile 1": cls.slots,
            "rope": 1,
            "rope free": 1,
            "queries taken": 2,
            "alpha": 2,
            "probs": 1,
            "norm": 2,
        }

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """Shared memory and barriers; subclasses add `tiles`, the ring of each half."""
        scratch = {
            "rope": swizzled(TILE, g.rope, dtype=jnp.bfloat16),
            "rope_queries": swizzled(TILE, g.rope, dtype=jnp.bfloat16),
            "last_queries": swizzled(TILE, ASIDE, dtype=cls.dtype),
            "probs": swizzled(TILE, TILE, dtype=cls.dtype),
            # of even and odd tiles: alpha; of even and odd items: 1 / sum
            "factors": plgpu.SMEM((4, TILE), jnp.float32),
            "signals": plgpu.Barrier(num_barriers=sum(cls.signals().values())),
            "probs_free": plgpu.Barrier(num_arrivals=2),
        }
        if g.interpret:
            columns = (g.half, max(g.half - ASIDE, ASIDE))
            scratch["left"] = [swizzled(TILE, n, dtype=cls.dtype) for n in columns]
        return scratch

    def __init__(self, g: Geometry, refs: SimpleNamespace) -> None:
        worker, self.part = lax.axis_index("worker"), lax.axis_index("part")
        self.g, self.refs = g, refs
        self.first_item, self.first_step = refs.workers[worker, 0], refs.workers[worker, 1]
        self.end_item = refs.workers[worker + 1, 0]
        self.num_steps = refs.workers[worker + 1, 1] - self.first_step
        self.first_page = refs.layer[0] * g.pages

    def signal(self, name: str, index: jax.Array | int = 0) -> Any:
        """A barrier."""
        first = 0
        for other, count in self.signals().items():
            if other == name:
                return self.refs.signals.at[first + index]
            first += count
        raise KeyError(name)

    # ------------------------------------------------------------ how tiles reach shared memory

    @abc.abstractmethod
    def begin(self, half: int) -> tuple[jax.Array, ...]:
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

    def load(self, step: jax.Array | int) -> jax.Array:
        """What a step loads: a page, or -1 - group for queries."""
        return self.refs.steps[self.first_step + step]

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

    def copy_page(self, load: jax.Array, step: jax.Array, copy: Callable[..., None]) -> None:
        """Calls `copy` with a page of the pool, if that is what the step loads."""
        page = self.first_page + load
        pl.when((load >= 0) & (step < self.num_steps))(lambda: copy(page))

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
