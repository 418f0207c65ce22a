"""The gradient of the weights of `grouped_matmul` for Hopper: bf16, fp32 sums over a group's rows.

    out[e, n, k] = sum over the rows r of group e of grad[r, n] x[r, k]

A thread block takes every n-th item: 128 outputs times some inputs of an expert; the warpgroups
are those of `block`. Rows are loaded 64 at a time from a multiple of `ROW_ALIGN` on. So the first
and the last load of a group may hold rows of others, and rows past the groups even NaN: these are
overwritten with zeros, in both operands, by the warpgroups that multiply.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.block import store_by_columns
from pallas_kernels.grouped_matmul.launch import Kernel, launch
from pallas_kernels.grouped_matmul.padded import BLOCK, ROW_ALIGN, padded
from pallas_kernels.grouped_matmul.ring import (
    Phase,
    barriers,
    load_in_one_warp,
    load_item,
    sum_products,
    wait_until_empty,
)
from pallas_kernels.grouped_matmul.tiles import Tiles, weight_gradient_tiles
from pallas_kernels.select import count_sms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is known when the kernel is compiled.

    Attributes:
        rows: of the arrays that are loaded.
        experts: E.
        outputs: N.
        inputs: K.
        tiles: see there.
        thread_blocks: of the grid.
        interpret: parameters of Pallas' GPU interpreter; None on a GPU.
    """

    rows: int
    experts: int
    outputs: int
    inputs: int
    tiles: Tiles
    thread_blocks: int
    interpret: Any = None

    @property
    def across(self) -> int:
        """Items beside each other, with the same outputs of an expert."""
        return -(-self.inputs // self.tiles.outputs)

    @property
    def items(self) -> int:
        """Of an expert."""
        return -(-self.outputs // self.tiles.rows) * self.across

    @property
    def deep(self) -> int:
        """Rows of a load."""
        return self.tiles.deep * BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """Outputs and inputs of an expert, and its group of rows.

    Attributes:
        expert: of the weights.
        outputs: the first.
        inputs: the first.
        start: first row of the group.
        stop: the row after its last.
    """

    expert: jax.Array
    outputs: jax.Array
    inputs: jax.Array
    start: jax.Array
    stop: jax.Array

    @property
    def aligned(self) -> jax.Array:
        """The first row that is loaded."""
        return lax.div(self.start, ROW_ALIGN) * ROW_ALIGN


class WeightGradient(Kernel):
    """What a warpgroup works with.

    Attributes of `refs`, in memory: grad [M, N], x [M, K], bounds i32 [E, 2] (see `Item`) and out
    [E, N, K]; in shared memory see `scratch`.
    """

    def __init__(self, g: Geometry) -> None:
        self.g = g

    @property
    def name(self) -> str:
        """See `Kernel`."""
        return f"grouped_matmul_dw_{self.g.tiles.outputs}"

    def scratch(self) -> dict[str, Any]:
        """See `Kernel`."""
        tiles, ring = self.g.tiles, functools.partial(hopper.swizzled, dtype=jnp.bfloat16)
        return {
            "grad_ring": ring(tiles.stages, self.g.deep, tiles.rows),
            "x_ring": ring(tiles.stages, self.g.deep, tiles.outputs),
            "staged": hopper.swizzled_rows(2, tiles.staged, 64, 64, dtype=jnp.bfloat16),
            "cleared": plgpu.Barrier(num_arrivals=2),
            **barriers(tiles, copies=2),
        }

    def run(self, refs: SimpleNamespace) -> None:
        """See `Kernel`."""
        self.refs = refs
        self.me, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        total = self.g.experts * self.g.items - self.me + (self.g.thread_blocks - 1)
        self.items = lax.div(total, self.g.thread_blocks)
        how: Any = {"tiles": self.g.tiles, "interpret": self.g.interpret}
        pl.when(warpgroup == 2)(lambda: load_in_one_warp(self._load, **how))
        pl.when(warpgroup < 2)(lambda: self._multiply(warpgroup))

    def item(self, order: jax.Array) -> Item:
        """That thread block's item."""
        g = self.g
        item = self.me + order * g.thread_blocks
        expert, place = lax.div(item, g.items), lax.rem(item, g.items)
        return Item(
            expert=expert,
            outputs=lax.div(place, g.across) * g.tiles.rows,
            inputs=lax.rem(place, g.across) * g.tiles.outputs,
            start=self.refs.bounds[expert, 0],
            stop=self.refs.bounds[expert, 1],
        )

    def loads(self, item: Item) -> jax.Array:
        """Of an item; none for a group without rows."""
        loads = lax.div(item.stop - item.aligned + (self.g.deep - 1), self.g.deep)
        return jnp.where(item.stop > item.start, loads, 0)

    def row(self, item: Item, load: Any) -> jax.Array:
        """The first row of a load: the last load of all begins early, so as not to reach past the
        last row.
        """
        last = (self.g.rows - self.g.deep) // ROW_ALIGN
        early = jnp.minimum(
            lax.div(item.start, ROW_ALIGN) + load * (self.g.deep // ROW_ALIGN), last
        )
        return early * ROW_ALIGN

    # ------------------------------------------------------------ loading

    def _load(self) -> None:
        refs, tiles = self.refs, self.g.tiles
        how: Any = {"stages": tiles.stages, "interpret": self.g.interpret}

        def one(order: jax.Array, first: jax.Array) -> jax.Array:
            item = self.item(order)
            loads = self.loads(item)

            def copy(slot: jax.Array, load: jax.Array) -> None:
                rows, full = pl.ds(self.row(item, load), self.g.deep), refs.full.at[slot]
                grad = refs.grad.at[rows, pl.ds(item.outputs, tiles.rows)]
                x = refs.x.at[rows, pl.ds(item.inputs, tiles.outputs)]
                plgpu.copy_gmem_to_smem(grad, refs.grad_ring.at[slot], full)
                plgpu.copy_gmem_to_smem(x, refs.x_ring.at[slot], full)

            load_item(refs, first, loads, copy, **how)
            return first + loads

        loads = lax.fori_loop(0, self.items, one, jnp.int32(0))
        wait_until_empty(refs, loads, **how)

    # ------------------------------------------------------------ multiplying

    def _multiply(self, warpgroup: jax.Array) -> None:
        if self.g.tiles.registers:
            plgpu.set_max_registers(self.g.tiles.registers[1], action="increase")
        half = pl.ds(warpgroup * 64, 64)

        def operands(slot: jax.Array) -> tuple[Any, Any]:
            grad = self.refs.grad_ring.at[slot, :, half]
            return grad.transpose((1, 0)), self.refs.x_ring.at[slot]

        def one(order: jax.Array, first: jax.Array) -> jax.Array:
            item = self.item(order)
            loads = self.loads(item)
            clear = functools.partial(self._clear, warpgroup, item)
            phases = [
                Phase(end=jnp.minimum(loads, 1), prepare=clear),
                Phase(end=jnp.maximum(loads - 1, jnp.minimum(loads, 1))),
                Phase(end=loads, prepare=clear),
            ]
            size = {"columns": self.g.tiles.outputs, "stages": self.g.tiles.stages}
            sums = sum_products(self.refs, first, phases, operands, **size).astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def copy(staged: Any, column: int) -> None:
                outputs = pl.ds(item.outputs + warpgroup * 64, 64)
                inputs = pl.ds(item.inputs + column, 64)
                plgpu.copy_smem_to_gmem(staged, self.refs.out.at[item.expert, outputs, inputs])

            store_by_columns(sums, self.refs.staged.at[warpgroup], copy)
            return first + loads

        lax.fori_loop(0, self.items, one, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _clear(self, warpgroup: jax.Array, item: Item, slot: jax.Array, load: jax.Array) -> None:
        """Overwrites rows of other groups, and those that a last load which begins early has a
        second time; each warpgroup takes every second piece.
        """
        row = self.row(item, load)
        own = jnp.maximum(item.aligned + load * self.g.deep, item.start)
        begin, end = own - row, item.stop - row
        for number, (piece, down) in enumerate(self._pieces(slot)):

            @pl.when(warpgroup == number % 2)
            def _(piece: Any = piece, down: int = down) -> None:
                index = down + lax.broadcasted_iota(jnp.int32, (64, 64), 0)
                index = plgpu.layout_cast(index, hopper.MATRIX)
                mine = (index >= begin) & (index < end)
                piece[...] = jnp.where(mine, piece[...], jnp.bfloat16(0))

        plgpu.commit_smem()
        plgpu.barrier_arrive(self.refs.cleared)
        plgpu.barrier_wait(self.refs.cleared)

    def _pieces(self, slot: jax.Array) -> list[tuple[Any, int]]:
        """Of 64 rows and 64 columns of both operands; (piece, its first row)."""
        rings = ((self.refs.grad_ring, self.g.tiles.rows), (self.refs.x_ring, self.g.tiles.outputs))
        return [
            (ring.at[slot, pl.ds(down, 64), pl.ds(across, 64)], down)
            for ring, columns in rings
            for down in range(0, self.g.deep, 64)
            for across in range(0, columns, 64)
        ]


def weight_gradient(
    grad: BFloat16[Array, "M N"],
    x: BFloat16[Array, "M K"],
    group_sizes: Int[Array, " E"],
    *,
    tiles: Tiles | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> BFloat16[Array, "E N K"]:
    """Sums over each group of rows; exactly 0 for groups without rows.

    Args:
        grad: of the results; rows past sum(group_sizes) may hold anything.
        x: rows in group order; likewise.
        group_sizes: rows of each group.
        tiles: what a sweep changes.
        sms: streaming multiprocessors; those of the device.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
    """
    tiles = tiles or weight_gradient_tiles(x.shape[1])
    operands = [padded(a, rows=tiles.deep * BLOCK) for a in (grad, x)]
    g = Geometry(
        rows=operands[0].shape[0],
        experts=group_sizes.shape[0],
        outputs=grad.shape[1],
        inputs=x.shape[1],
        tiles=tiles,
        thread_blocks=(sms or count_sms()) * tiles.per_sm,
        interpret=interpret,
    )
    stops = jnp.cumsum(group_sizes.astype(jnp.int32))
    bounds = jnp.stack([stops - group_sizes, stops], axis=1)
    return _run(*operands, bounds.astype(jnp.int32), g)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=3)
def _run(grad: jax.Array, x: jax.Array, bounds: jax.Array, g: Geometry) -> jax.Array:
    return launch(
        WeightGradient(g),
        {"grad": grad, "x": x, "bounds": bounds},
        jax.ShapeDtypeStruct((g.experts, g.outputs, g.inputs), jnp.bfloat16),
        tiles=g.tiles,
        thread_blocks=g.thread_blocks,
        interpret=g.interpret,
    )
