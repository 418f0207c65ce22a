"""A thread block of the Hopper kernels of `grouped_matmul`: what it does in which order.

The grid is as large as the device, and a thread block takes every n-th item: 128 outputs or more of
a tile of rows (see `work.py`), tile by tile, so that an expert's weights are read once from memory.
Thread blocks of a cluster (see `Tiles`) take items next to each other and share what they copy.

    warpgroup 2       one thread of it copies weights, rows and their scales into a ring of stages,
                      item after item: it never waits for an item to end
    warpgroups 0, 1   multiply, and store half of the item each: 64 outputs of all its rows where
                      weights are the left operand, 64 rows otherwise
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.launch import Kernel, launch
from pallas_kernels.grouped_matmul.products import BLOCK
from pallas_kernels.grouped_matmul.ring import (
    CLUSTER,
    barriers,
    leave_together,
    load_in_one_warp,
    load_item,
    release,
    wait_until_empty,
)
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.work import EXPERT, FIRST, ROWS, SKIP, Work
from pallas_kernels.hopper import swizzled_rows
from pallas_kernels.select import count_sms

OUTPUTS = 128
"""Of an item where weights are the left operand: 64 for each warpgroup."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is known when the kernel is compiled.

    Attributes:
        outputs: N.
        inputs: K.
        block: inputs of a block: a row of 128 bytes.
        tiles: see there.
        thread_blocks: of the grid, a multiple of `tiles.cluster`.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.
    """

    outputs: int
    inputs: int
    block: int = BLOCK
    tiles: Tiles
    thread_blocks: int
    interpret: Any = None

    @classmethod
    def of(
        cls, shape: tuple[int, ...], tiles: Tiles, sms: int | None, interpret: Any
    ) -> "Geometry":
        """That of weights [E, ..., N, K] on so many streaming multiprocessors, or the device's.

        Raises:
            ValueError: thread blocks of a cluster would have different numbers of items.
        """
        outputs, width = math.prod(shape[1:-1]), tiles.outputs * tiles.cluster
        if tiles.cluster > 1 and outputs % width:
            raise ValueError(f"{outputs=} must be a multiple of {width} with {tiles.cluster=}")
        clusters = (sms or count_sms()) * tiles.per_sm // tiles.cluster
        return cls(
            outputs=outputs,
            inputs=shape[-1],
            tiles=tiles,
            thread_blocks=max(clusters, 1) * tiles.cluster,
            interpret=interpret,
        )

    @property
    def items(self) -> int:
        """Of a tile of rows, for each thread block of a cluster."""
        return -(-self.outputs // (self.tiles.outputs * self.tiles.cluster))

    @property
    def clusters(self) -> int:
        """Of the grid: thread blocks where these are alone."""
        return self.thread_blocks // self.tiles.cluster

    @property
    def loads(self) -> int:
        """Of an item."""
        return -(-self.inputs // (self.block * self.tiles.deep))


class Block(Kernel):
    """What a warpgroup works with; subclasses are the formats of the weights.

    Attributes of `refs`, in memory: `tiles` and `counts` of the work, out [M, N], and what
    subclasses load; in shared memory see `scratch`.
    """

    copies: int
    """Of a load."""
    weights_left: bool
    """Whether weights are the left operand: 64 of them is what a product takes, so tokens, of
    which there may be few, are not padded to 64.
    """

    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers; subclasses add the ring."""
        parts = (2, self.g.tiles.rows) if self.weights_left else (2, self.g.tiles.staged, 64)
        return {
            "staged": swizzled_rows(*parts, 64, dtype=jnp.bfloat16),
            **barriers(self.g.tiles, copies=self.copies),
        }

    def __init__(self, g: Geometry) -> None:
        self.g = g

    def run(self, refs: SimpleNamespace) -> None:
        """The kernel."""
        self.refs = refs
        self.me, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        clusters = self.g.clusters
        self.items, self.loaded_items = (
            lax.div(count * self.g.items - self.me + (clusters - 1), clusters)
            for count in self.counts()
        )
        pl.when(warpgroup == 2)(self._load)
        pl.when(warpgroup < 2)(lambda: self._multiply(warpgroup))

    def counts(self) -> tuple[Any, Any]:
        """How many tiles there are, and how many of these have an expert."""
        return self.refs.counts[0], self.refs.counts[1]

    def tile(self, index: jax.Array) -> tuple[Any, Any, Any, Any]:
        """A tile's columns of `Work.tiles`."""
        tiles = self.refs.tiles
        return tiles[index, EXPERT], tiles[index, FIRST], tiles[index, SKIP], tiles[index, ROWS]

    def first_output(self, outputs: jax.Array) -> jax.Array:
        """Of an item of a tile."""
        return outputs * self.g.tiles.outputs

    def item(self, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(tile, block of outputs) of this thread block's item."""
        item, size = self.me + order * self.g.clusters, self.g.tiles.cluster
        tile, outputs = lax.div(item, self.g.items), lax.rem(item, self.g.items)
        return tile, outputs if size == 1 else outputs * size + lax.axis_index(CLUSTER)

    def first_slot(self, order: jax.Array) -> jax.Array:
        """Where the first load of an item is."""
        return lax.rem(order * self.g.loads, self.g.tiles.stages)

    def slot_after(self, slot: jax.Array) -> jax.Array:
        """Where the next load is: without a division, whose result products would wait for."""
        return jnp.where(slot == self.g.tiles.stages - 1, 0, slot + 1)

    def release(self, slot: jax.Array) -> None:
        """Says that this warpgroup is through with a slot."""
        release(self.refs, slot, tiles=self.g.tiles, interpret=self.g.interpret)

    # ------------------------------------------------------------ loading

    @abc.abstractmethod
    def copy(
        self, slot: jax.Array, expert: jax.Array, row: jax.Array, outputs: jax.Array, load: Any
    ) -> None:
        """Starts the copies of a load into a slot, each of which arrives at `full`.

        Args:
            slot: of the ring.
            expert: of the weights.
            row: the first of the tile.
            outputs: which item of the tile.
            load: which `deep` blocks of inputs.
        """

    def _load(self) -> None:
        load_in_one_warp(self._load_items, tiles=self.g.tiles, interpret=self.g.interpret)

    def _load_items(self) -> None:
        loads, refs = self.g.loads, self.refs
        how: Any = {"stages": self.g.tiles.stages, "interpret": self.g.interpret}

        def item(order: jax.Array, _: Any) -> Any:
            tile, outputs = self.item(order)
            expert, row, _, _ = self.tile(tile)

            def copy(slot: jax.Array, load: jax.Array) -> None:
                self.copy(slot, expert, row, outputs, load)

            load_item(refs, order * loads, loads, copy, **how)
            return 0

        lax.fori_loop(0, self.loaded_items, item, 0)
        wait_until_empty(refs, self.loaded_items * loads, **how)

    # ------------------------------------------------------------ multiplying

    @abc.abstractmethod
    def sums(
        self,
        warpgroup: jax.Array,
        order: jax.Array,
        expert: jax.Array,
        row: jax.Array,
        outputs: jax.Array,
    ) -> jax.Array:
        """This warpgroup's half of an item: fp32 [64, rows] where weights are the left operand,
        else [64, outputs]. Zeros for tiles without an expert.

        Args:
            warpgroup: 0 or 1.
            order: of the item, in this thread block.
            expert: -1 for none.
            row: the first of the tile.
            outputs: which item of the tile.
        """

    def _multiply(self, warpgroup: jax.Array) -> None:
        if self.g.tiles.registers:
            plgpu.set_max_registers(self.g.tiles.registers[1], action="increase")

        def item(order: jax.Array, _: Any) -> Any:
            tile, outputs = self.item(order)
            expert, first, skip, rows = self.tile(tile)
            sums = self.sums(warpgroup, order, expert, first, outputs)
            self.store(warpgroup, sums, expert, outputs, first, skip, skip + rows)
            return 0

        lax.fori_loop(0, self.items, item, 0)
        plgpu.wait_smem_to_gmem(0)
        leave_together(self.refs, tiles=self.g.tiles)

    def store(
        self,
        warpgroup: jax.Array,
        sums: jax.Array,
        expert: jax.Array,
        outputs: jax.Array,
        first: jax.Array,
        begin: Any,
        end: Any,
    ) -> None:
        """Starts to store this warpgroup's half of an item.

        Args:
            warpgroup: 0 or 1.
            sums: what `sums` returns.
            expert: -1 for none.
            outputs: which item of the tile.
            first: row of the tile.
            begin: the first row that is stored, counted from there.
            end: the row after the last.
        """
        del expert
        results = sums.astype(jnp.bfloat16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store = self._store_columns if self.weights_left else self._store_rows
        store(warpgroup, results, outputs, first, begin, end)

    def _store_columns(
        self,
        warpgroup: jax.Array,
        sums: jax.Array,
        outputs: jax.Array,
        first: jax.Array,
        begin: Any,
        end: Any,
    ) -> None:
        staged = self.refs.staged.at[warpgroup]
        transposed = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
        staged.transpose((1, 0))[...] = transposed
        plgpu.commit_smem()
        columns = pl.ds(self.first_output(outputs) + warpgroup * 64, 64)
        _copy_rows(staged, self.refs.out.at[:, columns], first, begin, end)

    def _store_rows(
        self,
        warpgroup: jax.Array,
        sums: jax.Array,
        outputs: jax.Array,
        first: jax.Array,
        begin: Any,
        end: Any,
    ) -> None:
        mine = warpgroup * 64
        begin, end = (jnp.clip(row - mine, 0, 64) for row in (begin, end))

        def copy(staged: Any, column: int) -> None:
            columns = pl.ds(self.first_output(outputs) + column, 64)
            _copy_rows(staged, self.refs.out.at[:, columns], first + mine, begin, end)

        store_by_columns(sums, self.refs.staged.at[warpgroup], copy)


def store_by_columns(values: jax.Array, staged: Any, copy: Callable[[Any, int], None]) -> None:
    """Stores a warpgroup's [64, columns] by way of shared memory [n, 64, width], which nothing must
    be reading: n pieces of `width` columns at once. `copy` is called with a staged piece and its
    first column.
    """
    together, _, width = staged.shape
    for first in range(0, values.shape[1], width * together):
        if first:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pieces = range(first, min(first + width * together, values.shape[1]), width)
        for slot, column in enumerate(pieces):
            staged.at[slot][...] = values[:, column : column + width]
        plgpu.commit_smem()
        for slot, column in enumerate(pieces):
            copy(staged.at[slot], column)


def multiply_tiles(block: Block, operands: dict[str, jax.Array], work: Work) -> jax.Array:
    """Runs a kernel: bf16 [M, N].

    Args:
        block: what it does.
        operands: what it reads, by the names in `Block.refs`; x [M, K] among them.
        work: likewise.
    """
    operands = operands | {"tiles": work.tiles, "counts": work.counts}
    g = block.g
    return launch(
        block,
        operands,
        jax.ShapeDtypeStruct((operands["x"].shape[0], g.outputs), jnp.bfloat16),
        tiles=g.tiles,
        thread_blocks=g.thread_blocks,
        interpret=g.interpret,
    )


def _copy_rows(staged: Any, out: Any, first: jax.Array, begin: Any, end: Any) -> None:
    """Starts to copy rows begin..end of a tile to where the tile begins: the sizes of copies are
    fixed, so by powers of two.
    """
    size, count = staged.shape[0], end - begin
    while size:

        @pl.when((count & size) != 0)
        def _(size: int = size, begin: Any = begin) -> None:
            rows = out.at[pl.ds(first + begin, size)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(begin, size)], rows)

        begin, size = begin + (count & size), size // 2
