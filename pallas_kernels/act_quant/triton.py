"""`act_quant` as one kernel in Triton: each tile is read, reduced and written once."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.quant import QTensor, Recipe
from pallas_kernels.triton_ops import compiler_params
from pallas_kernels.triton_quant import quantise_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How work is cut.

    Attributes:
        elements: a program's, at least; a power of two. One tile if that is longer.
        per_thread: elements of a thread.
    """

    elements: int = 2048
    per_thread: int = 16

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")


def act_quant(
    x: Float[Array, "*B T K"],
    recipe: Recipe,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> QTensor:
    """See `api.act_quant`.

    Args:
        tiles: how work is cut.
        interpret: run on a CPU.
    """
    *lead, columns = x.shape
    width = recipe.block[1] or columns
    per_row = -(-columns // width)
    count = math.prod(lead) * per_row
    values, scales = _run(x, recipe, x.shape, (count,), tiles or Tiles(), interpret)
    return QTensor(values, scales.reshape(*lead, per_row), (1, width), "e4m3")


def quantise_by_column(
    x: Float[Array, "T K"],
    recipe: Recipe,
    *,
    rows: int,
    scale_rows: int,
    interpret: bool = False,
) -> tuple[Float[Array, "R K"], Float[Array, "B S"]]:
    """The same as a kernel may read it: all scales of a block of columns next to each other, and
    room for more rows, which hold anything.

    Args:
        x: rows.
        recipe: with a scale per block of columns; K a multiple of that.
        rows: of the values, at least T.
        scale_rows: of the scales, at least T.
        interpret: run on a CPU.

    Returns:
        Values [rows, K] and scales [K / block, scale_rows].
    """
    assert min(rows, scale_rows) >= x.shape[0] and x.shape[1] % recipe.block[1] == 0
    blocks = x.shape[1] // recipe.block[1]
    return _run(x, recipe, (rows, x.shape[1]), (blocks, scale_rows), Tiles(), interpret)


def _run(
    x: jax.Array,
    recipe: Recipe,
    shape: tuple[int, ...],
    scales_shape: tuple[int, ...],
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Values of that shape and scales of that: one after the other, or [blocks, rows]."""
    columns = x.shape[-1]
    width = recipe.block[1] or columns
    one_row = columns if columns % width else width  # else a row of `x_ref` is a tile
    step = pl.next_power_of_2(width)
    count = math.prod(x.shape[:-1]) * -(-columns // width)
    at_once = max(1, tiles.elements // step)
    warps = min(max(at_once * step // tiles.per_thread // 32, 1), 16)
    kernel = functools.partial(
        _kernel, recipe=recipe, width=width, step=step, at_once=at_once, interpret=interpret
    )
    values, scales = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((math.prod(shape) // one_row, one_row), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(scales_shape, jnp.float32),
        ],
        grid=(-(-count // at_once),),
        compiler_params=compiler_params(warps),
        interpret=interpret,
        name="act_quant",
    )(x.reshape(-1, one_row))
    return values.reshape(shape), scales


def _kernel(
    x_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    *,
    recipe: Recipe,
    width: int,
    step: int,
    at_once: int,
    interpret: bool,
) -> None:
    rows, columns = x_ref.shape
    per_row = -(-columns // width)
    tile = pl.program_id(0) * at_once + jnp.arange(at_once)
    row, first = (tile, 0) if per_row == 1 else (tile // per_row, tile % per_row * width)
    column = (first + jnp.zeros_like(tile))[:, None] + jnp.arange(step)[None]
    where = jnp.broadcast_to(row[:, None], column.shape), column
    is_real = (row < rows)[:, None] & (column < columns)
    x = plt.load(x_ref.at[where], mask=is_real, other=0.0).astype(jnp.float32)
    values, scales = quantise_tiles(x, recipe, interpret)
    plt.store(values_ref.at[where], values, mask=is_real)
    blocks = scales_ref.shape[0]
    place = (tile,) if scales_ref.ndim == 1 else (tile % blocks, tile // blocks)
    plt.store(scales_ref.at[place], scales, mask=row < rows)
