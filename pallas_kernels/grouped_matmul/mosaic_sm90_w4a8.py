"""`grouped_matmul` for Hopper (H100, H200) with int4 weights, packed, a scale per output and 128
inputs; and e4m3 rows with a scale each, which is multiplied last.

Weights are the left operand for any number of rows: they become e4m3 in registers, 128 inputs
ahead, while the tensor cores multiply.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import products, rows
from pallas_kernels.grouped_matmul.block import Block, Geometry, multiply_tiles
from pallas_kernels.grouped_matmul.packed_int4 import UNIT, PackedInt4, as_e4m3
from pallas_kernels.grouped_matmul.products import BLOCK
from pallas_kernels.grouped_matmul.rows import Rows
from pallas_kernels.grouped_matmul.tiles import Tiles, w4a8_tiles
from pallas_kernels.quant import QTensor


class W4A8Block(Block):
    """Refs in memory: x [M, K], x_scales [M'], and of `PackedInt4` w [E, N / 64, K / 128, 8, 128]
    and w_scales [E, N / 64, K / 128, 64].
    """

    weights_left = True

    def __init__(self, g: Geometry, full_range: bool) -> None:
        super().__init__(g)
        self.full_range = full_range
        self.copies = g.tiles.deep + 2
        # Half of the columns are multiplied while the other half's product is added, and while
        # the next weights are made: a warpgroup keeps the tensor cores busy by itself.
        self.parts = 2 if g.tiles.rows == 128 else 1
        self.width = g.tiles.rows // self.parts

    @property
    def name(self) -> str:
        """See `Block`."""
        return f"grouped_matmul_w4a8_{self.g.tiles.rows}"

    def scratch(self) -> dict[str, Any]:
        """See `Block`. Scales of rows are copied by the warpgroups that multiply, for themselves:
        they need them once an item.
        """
        tiles = self.g.tiles
        ring, e4m3 = (tiles.stages, tiles.deep), jnp.float8_e4m3fn
        scratch = super().scratch() | {
            "x_ring": hopper.swizzled_rows(*ring, tiles.rows, BLOCK, dtype=e4m3),
            "w_ring": plgpu.SMEM((tiles.stages, 2, tiles.deep, 8, 128), jnp.int32),
            "scale_ring": plgpu.SMEM((tiles.stages, 2, tiles.deep, 64), jnp.float32),
            "row_scales": plgpu.SMEM((2, scale_rows(tiles)), jnp.float32),
            "have_row_scales": plgpu.Barrier(num_barriers=2),
        }
        if self.g.interpret:
            scratch["staged_weights"] = hopper.swizzled_rows(2, 64, BLOCK, dtype=e4m3)
        return scratch

    def copy(
        self, slot: jax.Array, expert: jax.Array, row: jax.Array, outputs: jax.Array, load: Any
    ) -> None:
        """See `Block`."""
        r, deep, size = self.refs, self.g.tiles.deep, self.g.tiles.rows
        full = r.full.at[slot]
        mine = expert, pl.ds(outputs * 2, 2), pl.ds(load * deep, deep)
        plgpu.copy_gmem_to_smem(r.w.at[mine], r.w_ring.at[slot], full)
        plgpu.copy_gmem_to_smem(r.w_scales.at[mine], r.scale_ring.at[slot], full)
        for i in range(deep):
            x = r.x.at[pl.ds(row, size), pl.ds((load * deep + i) * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(x, r.x_ring.at[slot, i], full)

    def sums(
        self,
        warpgroup: jax.Array,
        order: jax.Array,
        expert: jax.Array,
        row: jax.Array,
        outputs: jax.Array,
    ) -> jax.Array:
        """See `Block`."""
        g, r = self.g, self.refs
        scales, have_scales = r.row_scales.at[warpgroup], r.have_row_scales.at[warpgroup]
        plgpu.copy_gmem_to_smem(self._row_scales_from(row), scales, have_scales)
        item = _Item(
            warpgroup=warpgroup,
            loads=jnp.where(expert >= 0, g.loads, 0),
        )
        zeros = [products.zeros(self.width, g.interpret) for _ in range(self.parts)]
        slot = self.first_slot(order)
        pl.when(item.loads > 0)(lambda: plgpu.barrier_wait(r.full.at[slot]))
        sums, *_ = lax.fori_loop(
            0,
            lax.div(item.loads, g.tiles.together),
            functools.partial(self._step, item),
            (zeros, self._weights(warpgroup, slot, 0), slot),
        )
        matrix = products.as_matrix(sums, g.interpret)
        plgpu.barrier_wait(have_scales)
        mine, layout = scales.at[pl.ds(0, g.tiles.rows)], hopper.MATRIX.reduce(0)
        factors = plgpu.load(mine, layout=layout, optimized=False) * (1 / UNIT)
        return matrix * lax.broadcast_in_dim(factors, matrix.shape, [1])

    def _step(self, item: "_Item", index: jax.Array, state: Any) -> Any:
        """Adds the products of `together` loads. State: (sums, weights of the next block, its
        slot).
        """
        g, r, tiles = self.g, self.refs, self.g.tiles
        sums, left, slot = state
        started: list[_Product] = []
        for i in range(tiles.blocks):
            load, block = index * tiles.together + i // tiles.deep, i % tiles.deep
            ends = block + 1 == tiles.deep
            mine = r.scale_ring.at[slot, item.warpgroup, block]
            factors = plgpu.load(mine, layout=hopper.ROWS, optimized=False)
            staged = r.staged_weights.at[item.warpgroup] if g.interpret else None
            held = left
            for part in range(self.parts):
                right = r.x_ring.at[slot, block, pl.ds(part * self.width, self.width)]
                values = products.multiply_words(left, right, self.width, staged, g.interpret)
                last = part + 1 == self.parts
                if last and ends:
                    later = self._await(item, load + 1, slot)
                    held += self._weights(item.warpgroup, later, 0)
                elif last:
                    held += self._weights(item.warpgroup, slot, block + 1)
                emptied = slot if last and ends else None
                started.append(_Product(part, values, factors, held, emptied))
                if len(started) == self.parts:
                    sums = self._add(sums, started)
            left = held[2:]
            slot = later if ends else slot
        while started:
            sums = self._add(sums, started)
        return sums, left, slot

    def _add(self, sums: list[jax.Array], started: list["_Product"]) -> list[jax.Array]:
        """Adds the oldest product, and says so if it was the last of its slot."""
        product = started.pop(0)
        sums = list(sums)
        sums[product.part] = products.add_scaled(
            sums[product.part],
            product.values,
            product.factors,
            axis=0,
            in_flight=len(started),
            held=product.held,
            interpret=self.g.interpret,
        )
        if product.emptied is not None:
            self.release(product.emptied)
        return sums

    def _await(self, item: "_Item", load: Any, slot: jax.Array) -> jax.Array:
        """Waits for a load of the item, whose predecessor is in `slot`; its slot. After the last
        load that of the last, where something is.
        """
        later = self.slot_after(slot)
        pl.when(load < item.loads)(lambda: plgpu.barrier_wait(self.refs.full.at[later]))
        return jnp.where(load < item.loads, later, slot)

    def _weights(self, warpgroup: jax.Array, slot: jax.Array, block: int) -> tuple[jax.Array, ...]:
        words = self.refs.w_ring.at[slot, warpgroup, block]
        return as_e4m3(plgpu.load(words, layout=products.WORDS), self.full_range)

    def _row_scales_from(self, row: jax.Array) -> Any:
        return self.refs.x_scales.at[pl.ds(row, scale_rows(self.g.tiles))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Item:
    """What a warpgroup multiplies.

    Attributes:
        warpgroup: 0 or 1.
        loads: 0 where there is no expert.
    """

    warpgroup: jax.Array
    loads: jax.Array


class _Product(NamedTuple):
    """One that may be in flight.

    Attributes:
        part: of the columns.
        values: what only `products.add_scaled` may read.
        factors: a scale for each row.
        held: its left operand, and what is to be made while it is in flight.
        emptied: the slot that nobody needs after it.
    """

    part: int
    values: jax.Array
    factors: jax.Array
    held: tuple[jax.Array, ...]
    emptied: jax.Array | None


def scale_rows(tiles: Tiles) -> int:
    """Rows' scales that are copied for a tile: copies go to multiples of 128 bytes."""
    return max(tiles.rows, 32)


def grouped_matmul(
    x: QTensor,
    w: PackedInt4,
    group_sizes: Int[Array, " E"],
    *,
    tiles: Tiles | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`.

    Args:
        x: as there, with a scale for each row.
        w: as there.
        group_sizes: as there.
        tiles: what a sweep changes.
        sms: streaming multiprocessors; those of the device.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
    """
    tiles = tiles or usual_tiles(x, w)
    out = multiply(prepare(x, group_sizes, tiles), w, tiles=tiles, sms=sms, interpret=interpret)
    return out[: x.shape[0]]


def usual_tiles(x: QTensor, w: PackedInt4) -> Tiles:
    """Those of these shapes."""
    return w4a8_tiles(x.shape[0], w.shape[0], x.shape[1] // BLOCK)


def prepare(x: QTensor, group_sizes: Int[Array, " E"], tiles: Tiles) -> Rows:
    """What the kernel needs to know of the rows."""
    prepared = rows.prepare(x, group_sizes, size=tiles.rows, scales=scale_rows(tiles))
    used = jnp.arange(prepared.scales.shape[1]) < group_sizes.sum()
    # Sums of rows of no expert are 0, and stay so.
    return dataclasses.replace(prepared, scales=jnp.where(used, prepared.scales, 0))


def multiply(
    x: Rows, w: PackedInt4, *, tiles: Tiles, sms: int | None = None, interpret: Any = None
) -> Float[Array, "M *L"]:
    """`grouped_matmul` of prepared rows, [M', *w.shape[1:-1]]."""
    experts, *lead, _ = w.shape
    g = Geometry.of(w.shape, tiles, sms, interpret)
    words, scales = (a.reshape(experts, -1, *a.shape[len(lead) + 1 :]) for a in (w.words, w.scales))
    return _run(x, words, scales, g, w.full_range).reshape(-1, *lead)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(x: Rows, w: jax.Array, w_scales: jax.Array, g: Geometry, full_range: bool) -> jax.Array:
    operands = {"x": x.values, "x_scales": x.scales[0], "w": w, "w_scales": w_scales}
    return multiply_tiles(W4A8Block(g, full_range), operands, x.work)
