"""`matmul` for Hopper (H100, H200) with fp8 weights: rows are quantized to e4m3 with a scale per
128 inputs (DeepSeek-V3 report, section 3.3.2), and multiplied by the kernel of `grouped_matmul` for
such weights.

A dense product is one with a single group. Few rows and outputs are fewer items than a GPU has
streaming multiprocessors; then the inputs are split as well: each split is treated as a group,
which has all rows and its own inputs, and the fp32 sums of the splits are added afterwards, always
in the same order.

Backwards it is the op in plain JAX, of rows that are not quantized; weights have no gradient.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16

from pallas_kernels import hopper
from pallas_kernels.act_quant.triton import quantise_by_column
from pallas_kernels.grouped_matmul.block import Geometry, store_by_columns
from pallas_kernels.grouped_matmul.launch import launch
from pallas_kernels.grouped_matmul.mosaic_sm90_fp8 import Fp8Block, scale_rows
from pallas_kernels.grouped_matmul.products import BLOCK
from pallas_kernels.matmul.tiles import Cut, usual_cut
from pallas_kernels.matmul.xla import matmul as plain
from pallas_kernels.quant import FP8_TILE, QTensor
from pallas_kernels.select import count_sms


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseGeometry(Geometry):
    """What is known when the kernel is compiled; `inputs` are those of a split.

    Attributes:
        rows: of x, a multiple of `tiles.rows`.
        splits: see `Cut`.
    """

    rows: int
    splits: int

    @property
    def row_tiles(self) -> int:
        """Tiles of rows, of each split."""
        return self.rows // self.tiles.rows


class DenseBlock(Fp8Block):
    """An `Fp8Block` whose experts are splits. Refs in memory: x [M, K], x_scales, w [1, N, K] and
    w_scales [1, ceil(N / 128), K / 128]; out bf16 [M, N], or fp32 [splits, M, N] where there are
    several; [splits, N, M] if weights are the left operand.
    """

    g: DenseGeometry
    clusters = False

    @property
    def name(self) -> str:
        """See `Block`."""
        g = self.g
        return f"matmul_fp8_{g.tiles.rows}_{g.tiles.outputs}{'_split' if g.splits > 1 else ''}"

    def scratch(self) -> dict[str, Any]:
        """See `Block`."""
        scratch = super().scratch()
        if self.g.splits > 1 and self.weights_left:
            scratch["staged"] = plgpu.SMEM((2, 64, self.g.tiles.rows), jnp.float32)
        elif self.g.splits > 1:
            shape = (2, 2 * self.g.tiles.staged, 64, 32)
            scratch["staged"] = hopper.swizzled_rows(*shape, dtype=jnp.float32)
        return scratch

    def counts(self) -> tuple[int, int]:
        """See `Block`: tiles of all splits."""
        tiles = self.g.row_tiles * self.g.splits
        return tiles, tiles

    def tile(self, index: jax.Array) -> tuple[jax.Array, jax.Array, int, int]:
        """See `Block`; all rows of a tile are stored."""
        split, tile = lax.div(index, self.g.row_tiles), lax.rem(index, self.g.row_tiles)
        return split, tile * self.g.tiles.rows, 0, self.g.tiles.rows

    def first_output(self, outputs: jax.Array) -> jax.Array:
        """See `Block`; the last item begins early where outputs are no multiple of its size."""
        first = super().first_output(outputs)
        if self.g.outputs % self.g.tiles.outputs == 0:
            return first
        return jnp.minimum(first, self.g.outputs - self.g.tiles.outputs)

    def inputs_of(self, expert: jax.Array) -> tuple[int, Any]:
        """See `Fp8Block`."""
        return 0, expert * (self.g.inputs // BLOCK) if self.g.splits > 1 else 0

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
        """See `Block`; what the item before has stored is left out."""
        if self.g.splits > 1:
            store = functools.partial(self._store_sums, warpgroup, sums, expert, outputs, first)
        else:
            store = functools.partial(
                super().store, warpgroup, sums, expert, outputs, first, begin, end
            )
        if self.g.outputs % self.g.tiles.outputs == 0:
            store()
            return
        own = super().first_output(outputs)
        pl.when(self.first_output(outputs) + warpgroup * 64 >= own)(store)

    def _store_sums(
        self,
        warpgroup: jax.Array,
        sums: jax.Array,
        split: jax.Array,
        outputs: jax.Array,
        first: jax.Array,
    ) -> None:
        staged, out = self.refs.staged.at[warpgroup], self.refs.out.at[split]
        column, mine = self.first_output(outputs), warpgroup * 64
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if self.weights_left:
            staged[...] = sums
            plgpu.commit_smem()
            where = out.at[pl.ds(column + mine, 64), pl.ds(first, self.g.tiles.rows)]
            plgpu.copy_smem_to_gmem(staged, where)
            return

        def copy(piece: Any, offset: int) -> None:
            where = out.at[pl.ds(first + mine, 64), pl.ds(column + offset, 32)]
            plgpu.copy_smem_to_gmem(piece, where)

        store_by_columns(sums, staged, copy)


def matmul(
    x: BFloat16[Array, "*T K"],
    w: QTensor,
    *,
    cut: Cut | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> BFloat16[Array, "..."]:
    """See `api.matmul`.

    Args:
        x: as there.
        w: e4m3 [..., N, K] with a scale per 128 x 128.
        cut: what a sweep changes.
        sms: streaming multiprocessors; those of the device.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.

    Raises:
        NotImplementedError: a gradient is asked for with respect to `w`.
    """
    return _matmul(x, w, cut, sms, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(
    x: jax.Array, w: QTensor, cut: Cut | None, sms: int | None, interpret: Any
) -> jax.Array:
    rows_tk = x.reshape(-1, x.shape[-1])
    g = geometry(rows_tk.shape[0], w, cut, sms, interpret)
    out = multiply(*prepare(rows_tk, g), w, g)
    return out[: rows_tk.shape[0]].reshape(*x.shape[:-1], *w.shape[:-1])


def _forward(
    x: Any, w: Any, cut: Cut | None, sms: int | None, interpret: Any
) -> tuple[jax.Array, Any]:
    if any(leaf.perturbed for leaf in jax.tree.leaves(w)):
        raise NotImplementedError(
            "matmul: quantized weights have no gradient; train w as an array, or differentiate "
            "with respect to x only"
        )
    x, w = jax.tree.map(lambda leaf: leaf.value, (x, w))
    return _matmul(x, w, cut, sms, interpret), (x, w)


def _backward(
    cut: Cut | None, sms: int | None, interpret: Any, saved: Any, grad: jax.Array
) -> tuple[jax.Array, None]:
    del cut, sms, interpret
    x, w = saved
    _, pull = jax.vjp(lambda x: plain(x, w), x)
    return (*pull(grad), None)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def geometry(
    rows: int, w: QTensor, cut: Cut | None, sms: int | None, interpret: Any
) -> DenseGeometry:
    """Of so many rows and these weights; arguments as for `matmul`."""
    outputs, blocks = math.prod(w.shape[:-1]), w.shape[-1] // BLOCK
    sms = sms or count_sms()
    cut = cut or usual_cut(rows, outputs, blocks, sms)
    if refusal := cut.refusal(outputs, blocks):
        raise ValueError(f"matmul: {cut}: {refusal}")
    size = cut.tiles.rows
    padded = -(-rows // size) * size
    items = padded // size * -(-outputs // cut.tiles.outputs) * cut.splits
    return DenseGeometry(
        outputs=outputs,
        inputs=w.shape[-1] // cut.splits,
        tiles=cut.tiles,
        thread_blocks=min(sms * cut.tiles.per_sm, items),
        interpret=interpret,
        rows=padded,
        splits=cut.splits,
    )


def prepare(x: BFloat16[Array, "T K"], g: DenseGeometry) -> tuple[jax.Array, jax.Array]:
    """Rows in e4m3 [M, K] and their scales [K / 128, M'] as the kernel reads them."""
    return quantise_by_column(
        x,
        FP8_TILE,
        rows=g.rows,
        scale_rows=g.rows - g.tiles.rows + scale_rows(g.tiles),
        interpret=g.interpret is not None,
    )


def multiply(values: jax.Array, scales: jax.Array, w: QTensor, g: DenseGeometry) -> jax.Array:
    """bf16 [M, N] of prepared rows; rows past those that x had hold anything."""
    weights = w.values.reshape(1, g.outputs, -1)
    out = _run(values, scales, weights, w.scales.reshape(1, -1, w.shape[-1] // BLOCK), g)
    return add_splits(out, g) if g.splits > 1 else out


def add_splits(sums: jax.Array, g: DenseGeometry) -> jax.Array:
    """bf16 [M, N] of the splits' fp32 sums, added from the first on."""
    total = functools.reduce(jnp.add, [sums[split] for split in range(g.splits)])
    total = total.astype(jnp.bfloat16)
    return total.T if g.tiles.rows <= 64 else total


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=4)
def _run(
    x: jax.Array, x_scales: jax.Array, w: jax.Array, w_scales: jax.Array, g: DenseGeometry
) -> jax.Array:
    block = DenseBlock(g)
    shape = (g.outputs, g.rows) if block.weights_left else (g.rows, g.outputs)
    out = jax.ShapeDtypeStruct((g.rows, g.outputs), jnp.bfloat16)
    if g.splits > 1:
        out = jax.ShapeDtypeStruct((g.splits, *shape), jnp.float32)
    return launch(
        block,
        {"x": x, "x_scales": x_scales, "w": w, "w_scales": w_scales},
        out,
        tiles=g.tiles,
        thread_blocks=g.thread_blocks,
        interpret=g.interpret,
    )
