"""`grouped_matmul` for Hopper (H100, H200) with fp8 weights: rows with a scale per 128 inputs,
weights with one per 128 x 128.

The known kernels for this are DeepGEMM's (deepseek-ai/DeepGEMM, `m_grouped_fp8_gemm_nt`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import products, rows
from pallas_kernels.grouped_matmul.block import OUTPUTS, Block, Geometry, multiply_tiles
from pallas_kernels.grouped_matmul.products import BLOCK
from pallas_kernels.grouped_matmul.ring import CLUSTER
from pallas_kernels.grouped_matmul.rows import Rows
from pallas_kernels.grouped_matmul.tiles import Tiles, fp8_tiles
from pallas_kernels.quant import QTensor

IN_FLIGHT = 2
"""Products: one is scaled and added while the other is made."""


class _Product(NamedTuple):
    """One that may be in flight.

    Attributes:
        values: what only `products.add_scaled` may read.
        factors: scales of its rows, or columns.
        emptied: the slot that nobody needs after it.
    """

    values: jax.Array
    factors: jax.Array
    emptied: jax.Array | None


class Fp8Block(Block):
    """Refs in memory: those of `Rows`, w [E, N, K] and w_scales [E, N / 128, K / 128]."""

    clusters = True

    def __init__(self, g: Geometry) -> None:
        super().__init__(g)
        self.weights_left = g.tiles.rows <= 64
        self.width = OUTPUTS if self.weights_left else g.tiles.outputs
        self.copies = 2 * g.tiles.deep + 1

    @property
    def name(self) -> str:
        """See `Block`."""
        return f"grouped_matmul_fp8_{self.g.tiles.rows}"

    def scratch(self) -> dict[str, Any]:
        """See `Block`."""
        tiles = self.g.tiles
        ring = (tiles.stages, tiles.deep)
        return super().scratch() | {
            "x_ring": hopper.swizzled_rows(*ring, tiles.rows, BLOCK, dtype=jnp.float8_e4m3fn),
            "w_ring": hopper.swizzled_rows(*ring, self.width, BLOCK, dtype=jnp.float8_e4m3fn),
            "scale_ring": plgpu.SMEM((*ring, scale_rows(tiles)), jnp.float32),
        }

    def inputs_of(self, expert: jax.Array) -> tuple[jax.Array, Any]:
        """(An expert's matrix, its first block of inputs.)"""
        return expert, 0

    def copy(
        self, slot: jax.Array, expert: jax.Array, row: jax.Array, outputs: jax.Array, load: Any
    ) -> None:
        """See `Block`."""
        r, deep, size = self.refs, self.g.tiles.deep, self.g.tiles.rows
        matrix, first_block = self.inputs_of(expert)
        first, full = first_block + load * deep, r.full.at[slot]
        mine = pl.ds(self.first_output(outputs), self.width)
        together = CLUSTER if self.g.tiles.cluster > 1 else None
        for i in range(deep):
            inputs = pl.ds((first + i) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(r.w.at[matrix, mine, inputs], r.w_ring.at[slot, i], full)
            rows = r.x.at[pl.ds(row, size), inputs]
            plgpu.copy_gmem_to_smem(rows, r.x_ring.at[slot, i], full, collective_axes=together)
        scales = r.x_scales.at[pl.ds(first, deep), pl.ds(row, scale_rows(self.g.tiles))]
        plgpu.copy_gmem_to_smem(scales, r.scale_ring.at[slot], full)

    def sums(
        self,
        warpgroup: jax.Array,
        order: jax.Array,
        expert: jax.Array,
        row: jax.Array,
        outputs: jax.Array,
    ) -> jax.Array:
        """See `Block`."""
        g, r, tiles = self.g, self.refs, self.g.tiles
        columns = tiles.rows if self.weights_left else self.width
        axis, count = (1 if self.weights_left else 0), tiles.blocks
        matrix, first_block = self.inputs_of(jnp.maximum(expert, 0))
        mine = self.first_output(outputs) + (warpgroup * 64 if self.weights_left else 0)
        last = first_block + g.inputs // BLOCK - count

        def weight_scales(block: Any) -> list[jax.Array]:
            first = jnp.minimum(first_block + block, last)
            return [r.w_scales[matrix, lax.div(mine, 128), first + i] for i in range(count)]

        def step(index: jax.Array, state: Any) -> Any:
            sums, scales, slot = state
            later = weight_scales((index + 1) * count)  # now, because they come from memory
            started: list[_Product] = []
            for i in range(count):
                block = i % tiles.deep
                if block == 0:
                    plgpu.barrier_wait(r.full.at[slot])
                left, right = self._operands(warpgroup, slot, block)
                product = products.multiply(left, right, columns, g.interpret)
                factors = self._row_scales(warpgroup, slot, block) * scales[i]
                ends = block + 1 == tiles.deep
                started.append(_Product(product, factors, slot if ends else None))
                if len(started) == IN_FLIGHT:
                    sums = add(sums, started)
                slot = self.slot_after(slot) if ends else slot
            while started:
                sums = add(sums, started)
            return sums, later, slot

        def add(sums: jax.Array, started: list[_Product]) -> jax.Array:
            product = started.pop(0)
            sums = products.add_scaled(
                sums,
                product.values,
                product.factors,
                axis=axis,
                in_flight=len(started),
                interpret=g.interpret,
            )
            if product.emptied is not None:
                self.release(product.emptied)
            return sums

        steps = jnp.where(expert >= 0, g.loads // tiles.together, 0)
        state = products.zeros(columns, g.interpret), weight_scales(0), self.first_slot(order)
        sums, *_ = lax.fori_loop(0, steps, step, state)
        return products.as_matrix([sums], g.interpret)

    def _operands(self, warpgroup: jax.Array, slot: jax.Array, block: int) -> tuple[Any, Any]:
        half = pl.ds(warpgroup * 64, 64)
        rows, weights = self.refs.x_ring.at[slot, block], self.refs.w_ring.at[slot, block]
        return (weights.at[half], rows) if self.weights_left else (rows.at[half], weights)

    def _row_scales(self, warpgroup: jax.Array, slot: jax.Array, block: int) -> jax.Array:
        scales = self.refs.scale_ring.at[slot, block]
        if self.weights_left:
            mine, layout = scales.at[pl.ds(0, self.g.tiles.rows)], hopper.MATRIX.reduce(0)
        else:
            mine, layout = scales.at[pl.ds(warpgroup * 64, 64)], hopper.ROWS
        return plgpu.load(mine, layout=layout, optimized=False)


def scale_rows(tiles: Tiles) -> int:
    """Scales that a load takes for each block: copies go to multiples of 128 bytes."""
    return max(tiles.rows, 32 // tiles.deep)


def grouped_matmul(
    x: QTensor,
    w: QTensor,
    group_sizes: Int[Array, " E"],
    *,
    tiles: Tiles | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`.

    Args:
        x: as there, with scales for each row and 128 inputs.
        w: as there, with scales for 128 x 128.
        group_sizes: as there.
        tiles: what a sweep changes.
        sms: streaming multiprocessors; those of the device.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
    """
    tiles = tiles or usual_tiles(x, w)
    out = multiply(prepare(x, group_sizes, tiles), w, tiles=tiles, sms=sms, interpret=interpret)
    return out[: x.shape[0]]


def usual_tiles(x: QTensor, w: QTensor) -> Tiles:
    """Those of these shapes."""
    outputs = math.prod(w.shape[1:-1])
    return fp8_tiles(x.shape[0], w.shape[0], x.shape[1] // BLOCK, outputs)


def prepare(x: QTensor, group_sizes: Int[Array, " E"], tiles: Tiles) -> Rows:
    """What the kernel needs to know of the rows."""
    return rows.prepare(x, group_sizes, size=tiles.rows, scales=scale_rows(tiles))


def multiply(
    x: Rows, w: QTensor, *, tiles: Tiles, sms: int | None = None, interpret: Any = None
) -> Float[Array, "M *L"]:
    """`grouped_matmul` of prepared rows, [M', *w.shape[1:-1]]."""
    experts, *lead, inputs = w.shape
    g = Geometry.of(w.shape, tiles, sms, interpret)
    weights = w.values.reshape(experts, g.outputs, inputs)
    scales = w.scales.reshape(experts, g.outputs // OUTPUTS, inputs // BLOCK)
    return _run(x, weights, scales, g).reshape(-1, *lead)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=3)
def _run(x: Rows, w: jax.Array, w_scales: jax.Array, g: Geometry) -> jax.Array:
    operands = {"x": x.values, "x_scales": x.scales, "w": w, "w_scales": w_scales}
    return multiply_tiles(Fp8Block(g), operands, x.work)
