"""`grouped_matmul` for Hopper (H100, H200) of bf16 rows and weights, and its gradients.

    product           out[r] = w[e] @ x[r]
    gradient of rows  the same kernel, which then takes the weights' other axis for inputs
    of weights        see `weight_gradient`

With many rows an expert they are the left operand, 128 at a time; with few, weights are.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.block import OUTPUTS, Block, Geometry, multiply_tiles
from pallas_kernels.grouped_matmul.padded import BLOCK, ROW_ALIGN, padded
from pallas_kernels.grouped_matmul.ring import Phase, sum_products
from pallas_kernels.grouped_matmul.tiles import Tiles, bf16_tiles
from pallas_kernels.grouped_matmul.weight_gradient import weight_gradient
from pallas_kernels.grouped_matmul.work import Work, share_out
from pallas_kernels.select import count_sms


class Bf16Block(Block):
    """Refs in memory: x [M, K] and w [E, N, K], or w [E, K, N] if `transposed`."""

    copies = 2

    def __init__(self, g: Geometry, *, transposed: bool) -> None:
        super().__init__(g)
        self.weights_left = g.tiles.rows <= 64
        self.transposed = transposed
        self.deep = g.tiles.deep * g.block
        self.width = OUTPUTS if self.weights_left else g.tiles.outputs

    @property
    def name(self) -> str:
        """See `Block`."""
        return f"grouped_matmul_bf16_{self.g.tiles.rows}{'_t' if self.transposed else ''}"

    def scratch(self) -> dict[str, Any]:
        """See `Block`."""
        tiles, ring = self.g.tiles, functools.partial(hopper.swizzled, dtype=jnp.bfloat16)
        weights = (self.deep, self.width) if self.transposed else (self.width, self.deep)
        return super().scratch() | {
            "x_ring": ring(tiles.stages, tiles.rows, self.deep),
            "w_ring": ring(tiles.stages, *weights),
        }

    def copy(
        self, slot: jax.Array, expert: jax.Array, row: jax.Array, outputs: jax.Array, load: Any
    ) -> None:
        """See `Block`."""
        r, full = self.refs, self.refs.full.at[slot]
        # Multiplied last, so that the compiler sees it divisible.
        rows = pl.ds(lax.div(row, ROW_ALIGN) * ROW_ALIGN, self.g.tiles.rows)
        inputs = pl.ds(load * self.deep, self.deep)
        columns = pl.ds(outputs * self.width, self.width)
        where = (inputs, columns) if self.transposed else (columns, inputs)
        plgpu.copy_gmem_to_smem(r.w.at[expert, *where], r.w_ring.at[slot], full)
        plgpu.copy_gmem_to_smem(r.x.at[rows, inputs], r.x_ring.at[slot], full)

    def sums(
        self,
        warpgroup: jax.Array,
        order: jax.Array,
        expert: jax.Array,
        row: jax.Array,
        outputs: jax.Array,
    ) -> jax.Array:
        """See `Block`."""
        g = self.g
        return sum_products(
            self.refs,
            order * g.loads,
            [Phase(end=jnp.where(expert >= 0, g.loads, 0))],
            functools.partial(self._operands, warpgroup),
            columns=g.tiles.rows if self.weights_left else self.width,
            stages=g.tiles.stages,
        )

    def _operands(self, warpgroup: jax.Array, slot: jax.Array) -> tuple[Any, Any]:
        half = pl.ds(warpgroup * 64, 64)
        rows, weights = self.refs.x_ring.at[slot], self.refs.w_ring.at[slot]
        if not self.weights_left:
            return rows.at[half], weights if self.transposed else weights.transpose((1, 0))
        mine = weights.at[:, half].transpose((1, 0)) if self.transposed else weights.at[half]
        return mine, rows.transpose((1, 0))


def grouped_matmul(
    x: BFloat16[Array, "M K"],
    w: BFloat16[Array, "E *L K"],
    group_sizes: Int[Array, " E"],
    *,
    tiles: Tiles | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> BFloat16[Array, "M *L"]:
    """See `api.grouped_matmul`.

    Args:
        x: as there.
        w: as there.
        group_sizes: as there.
        tiles: what a sweep changes; those of the gradients are the usual ones.
        sms: streaming multiprocessors; those of the device.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
    """
    out: Any = _product(x, w, group_sizes, tiles, sms, interpret)
    return out.reshape(-1, *w.shape[1:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    tiles: Tiles | None,
    sms: int | None,
    interpret: Any,
) -> jax.Array:
    return multiply_rows(x, _flat(w), sizes, tiles=tiles, sms=sms, interpret=interpret)


def _flat(w: jax.Array) -> jax.Array:
    return w.reshape(w.shape[0], -1, w.shape[-1])


# w is kept as it came: of a reshaped one, a scan over layers would keep copies.
def _forward(x: Any, w: Any, sizes: Any, *static: Any) -> tuple[jax.Array, Any]:
    return _product(x, w, sizes, *static), (x, w, sizes)


def _backward(
    tiles: Tiles | None, sms: int | None, interpret: Any, saved: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    del tiles
    x, w, sizes = saved
    how: Any = {"sms": sms, "interpret": interpret}
    return (
        GRADIENTS["x"](grad, _flat(w), sizes, **how),
        GRADIENTS["w"](grad, x, sizes, **how).reshape(w.shape),
        None,
    )


_product.defvjp(_forward, _backward)


def multiply_rows(
    x: BFloat16[Array, "M K"],
    w: BFloat16[Array, "E _ _"],
    group_sizes: Int[Array, " E"],
    *,
    transposed: bool = False,
    work: Work | None = None,
    tiles: Tiles | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> BFloat16[Array, "M N"]:
    """out[r] = w[e] @ x[r], or w[e].T @ x[r] if `transposed`, without a gradient; rows past the
    groups are 0.

    Args:
        x: [M, K].
        w: [E, N, K], or [E, K, N].
        group_sizes: as for `grouped_matmul`.
        transposed: whether the inputs are the first axis of a weight.
        work: what `prepare` makes, if it is there already.
        tiles: as for `grouped_matmul`.
        sms: likewise.
        interpret: likewise.
    """
    outputs, inputs = w.shape[:0:-1] if transposed else w.shape[1:]
    tiles = tiles or bf16_tiles(x.shape[0], w.shape[0], outputs)
    g = Geometry(
        outputs=outputs,
        inputs=inputs,
        block=BLOCK,
        tiles=tiles,
        thread_blocks=(sms or count_sms()) * tiles.per_sm,
        interpret=interpret,
    )
    work = work or prepare(x, group_sizes, tiles)
    return _run(padded(x, rows=tiles.rows), padded(w), work, g, transposed)[: x.shape[0]]


GRADIENTS = {"x": functools.partial(multiply_rows, transposed=True), "w": weight_gradient}
"""The gradient of x or w from that of the results, the other argument, and the group sizes."""


def usual_tiles(x: jax.Array, w: jax.Array) -> Tiles:
    """Those of these shapes."""
    return bf16_tiles(x.shape[0], w.shape[0], math.prod(w.shape[1:-1]))


def prepare(x: jax.Array, group_sizes: jax.Array, tiles: Tiles) -> Work:
    """What the kernel needs to know of the rows."""
    rows = -(-max(x.shape[0], tiles.rows) // ROW_ALIGN) * ROW_ALIGN
    return share_out(group_sizes, rows=rows, size=tiles.rows, align=ROW_ALIGN)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _run(x: jax.Array, w: jax.Array, work: Work, g: Geometry, transposed: bool) -> jax.Array:
    return multiply_tiles(Bf16Block(g, transposed=transposed), {"x": x, "w": w}, work)
