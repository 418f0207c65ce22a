"""A thread block of the Hopper kernels of `mla_decode`: what its warpgroups share.

A worker (see `work.py`) has a thread block for every 64 query rows of a group. For each item it
takes the queries and then, page by page, the cached rows, tiles of 64. A load is a step, the first
one of an item is for the queries; steps are counted through all items of a worker, so the first
loads of an item overlap with the end of the one before.

    warpgroup 0       scores S = Q K^T and their softmax (`scores.py`); the queries stay in its
                      registers
    warpgroups 1, 2   O = alpha O + P V, half of the latent columns each (`values.py`), and loads

Formats of the cache differ in what lies in shared memory and in who reads it when: `tile_block.py`
has those that multiply 16-bit tiles, `mosaic_sm90_fp8_tensor.py` the one that multiplies e4m3.
"""

import abc
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import swizzled
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.work import TILE

LAUNCH_REGISTERS = 168
"""What each of 384 threads has at launch."""


class Block(abc.ABC):
    """What a warpgroup works with; subclasses are the formats of the cache.

    Attributes of `refs`, in memory: q_latent [T H, C], q_rope [T H, P], the pools latent_pool and
    rope_pool with layers and pages in one axis, layer [1], visible [T], workers, items, steps, and
    scale_pool or scales [L] of fp8 formats; results out [T H, C], lse [G, parts, 64], and for
    partial results out_parts and lse_parts with the number of the partial in front. The rest is
    shared memory, see `scratch`.
    """

    name: ClassVar[str]
    """Of the format."""
    dtype: ClassVar[Any]
    """Of probabilities and values when they are multiplied."""
    prob_slots: ClassVar[int] = 1
    """Tiles of probabilities that there is room for. What goes with them, alpha and 1 / sum, has a
    place more: it is written before a tile is known to have been read.
    """
    registers: ClassVar[tuple[int, int]] = (184, 160)
    """See `Tiles`."""
    copies_queries: ClassVar[bool] = True
    """Queries come by asynchronous copies."""
    value_factor: Any = 1.0
    """What values in shared memory must still be multiplied with."""

    @classmethod
    def signals(cls) -> dict[str, int]:
        """What one warpgroup or load tells others, with how many barriers. All of them are one
        array: each array costs every thread a register.
        """
        return {"alpha": cls.prob_slots + 1, "probs": cls.prob_slots, "norm": cls.prob_slots + 1}

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """Shared memory and barriers; subclasses add theirs."""
        return {
            "probs": swizzled(cls.prob_slots, TILE, TILE, dtype=cls.dtype),
            # alpha of a tile; then 1 / sum of an item
            "factors": plgpu.SMEM((2 * (cls.prob_slots + 1), TILE), jnp.float32),
            "signals": plgpu.Barrier(num_barriers=sum(cls.signals().values())),
            "probs_free": plgpu.Barrier(num_arrivals=2, num_barriers=cls.prob_slots),
        }

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

    def set_registers(self, role: int) -> None:
        """Takes or gives up registers: warpgroup 0 in role 0, the others in role 1."""
        count = (self.g.tiles.registers or self.registers)[role]
        action = "increase" if count >= LAUNCH_REGISTERS else "decrease"
        plgpu.set_max_registers(count, action=action)

    def load(self, step: jax.Array | int) -> jax.Array:
        """What a step loads: a page, or -1 - group for queries."""
        return self.refs.steps[self.first_step + step]

    def copy_page(self, load: jax.Array, step: jax.Array, copy: Any) -> None:
        """Calls `copy` with a page of the pool, if that is what the step loads."""
        page = self.first_page + load
        pl.when((load >= 0) & (step < self.num_steps))(lambda: copy(page))

    # ------------------------------------------------------------ warpgroup 0

    @abc.abstractmethod
    def take_queries(self, step: jax.Array, order: jax.Array) -> tuple[list[Any], Any]:
        """Queries of an item, as `scores` wants them, and what makes exponents of 2 of its scores:
        a number, or one for each row.
        """

    @abc.abstractmethod
    def scores(self, queries: list[Any], step: jax.Array) -> jax.Array:
        """Q K^T with the tile of a step, [64, 64], without any scale."""

    # ------------------------------------------------------------ warpgroups 1 and 2

    @abc.abstractmethod
    def begin(self, half: int) -> Any:
        """Loads before the first step; returns what the next two carry."""

    @abc.abstractmethod
    def begin_item(self, half: int, step: jax.Array, order: jax.Array, carry: Any) -> Any:
        """What a warpgroup does in the step of an item's queries."""

    @abc.abstractmethod
    def before_product(self, half: int, step: jax.Array, carry: Any) -> Any:
        """What it does in the step of a tile, while the probabilities are made."""

    @abc.abstractmethod
    def add(
        self, half: int, step: jax.Array, probs: Any, carry: Any, out: list[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        """O + P V with the tile of a step."""

    @abc.abstractmethod
    def values(self, half: int, step: jax.Array) -> list[Any]:
        """Shared memory with this half of a tile, by groups of columns."""

    def normed(self, out: jax.Array, norm: jax.Array) -> jax.Array:
        """Sums of values, fp32, divided by the row's sum of probabilities; norm is 0 in a row that
        sees nothing.
        """
        return out * norm

    @abc.abstractmethod
    def results(self, half: int, step: jax.Array) -> list[Any]:
        """Shared memory for this half of the results, each piece as large as a copy; after the
        item's last step nobody else uses it.
        """
